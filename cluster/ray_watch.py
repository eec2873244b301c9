"""Prints how many nodes of a Ray cluster are alive, whenever that changes: `node: alive=<n>`."""

from __future__ import annotations

import logging
import sys
import time

import ray

POLL_S = 1.0


def main() -> None:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)
    printed = -1
    while True:
        count = sum(bool(node["Alive"]) for node in ray.nodes())
        if count != printed:
            print(f"node: alive={count}", flush=True)
            printed = count
        time.sleep(POLL_S)


if __name__ == "__main__":
    main()
