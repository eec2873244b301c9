"""What launch/bench.py measures: ratios against judges, from one run on one machine."""
