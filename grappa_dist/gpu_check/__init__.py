"""What `launch/gpu_check.py` runs: whether this machine does it right, and how fast. One function for each check.

`checks.py` lists all of them. They need neither Ray nor faiss: jobs are called with the context of their only rank.
docs/gpu.md says what each row means.
"""
