"""What signals ask of a run: SIGTERM and Ctrl-C to save and end, a second Ctrl-C to end at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from grappa_dist.console import Interrupted, Terminated


@dataclass
class Signals:
    """Heard in the main thread."""

    looked_for: bool = False  # somebody asks `ending` now and then: what a handler raises while Ray waits may be lost
    _asked: bool = False
    _interrupts: int = 0

    def ending(self) -> bool:
        """Whether the run is to save and end."""
        return self._asked

    @property
    def interrupted(self) -> bool:
        return self._interrupts > 0

    @property
    def at_once(self) -> bool:
        """Whether nobody is to be waited for."""
        return self._interrupts > 1

    @contextmanager
    def heard(self) -> Iterator[None]:
        """While inside, SIGTERM raises Terminated and Ctrl-C Interrupted, at once or where they are looked for."""

        def handle(number: int, _: object) -> None:
            self._asked = True
            self._interrupts += number == signal.SIGINT
            if not self.looked_for:
                raise Terminated

        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        if before[signal.SIGINT] == signal.SIG_IGN:  # as a shell has it for what runs in the background
            del before[signal.SIGINT]
        try:
            for number in before:
                signal.signal(number, handle)
            yield
        except Terminated as ended:
            if self.interrupted:
                raise Interrupted(at_once=self.at_once, waited_s=ended.waited_s) from None
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: one that is not Python's
