"""What `launch/bench.py` measures: one file per command, and the harness that they share. Not part of the wheel."""
