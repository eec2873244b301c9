"""A command line that says what is wrong with it in one line, and the checks that commands share."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

import torch


class OneLineParser(argparse.ArgumentParser):
    """argparse prints its usage before an error, which hides the error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (--help lists the options)\n")


def check_least(settings: Any, **least: int) -> None:
    """Raises a ValueError that names the flag of a setting below its least value; None, not given, is none."""
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and value < bound:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {bound}, got {value}")


def check_positive(settings: Any, *names: str) -> None:
    """The same for settings that are at least 1."""
    check_least(settings, **dict.fromkeys(names, 1))


def check_device(device: str) -> None:
    """Raises a ValueError where a GPU is asked for and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
