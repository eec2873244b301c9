"""A stand-in for Ray, so that the death of nodes is tested in no time: each call ends by a rule of the test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar


class RayError(Exception):
    cause = None


class GetTimeoutError(RayError):
    pass


@dataclass(frozen=True)
class Ref:
    """One call of a worker's method."""

    worker: Worker
    method: str

    def future(self) -> Future[Any]:
        """Never done: no end of a call is reported, so it is found by a look."""
        return Future()


class Call:
    def __init__(self, worker: Worker, method: str) -> None:
        self.worker, self.method = worker, method

    def options(self, **_: object) -> Call:
        return self

    def remote(self, *_: object) -> Ref:
        self.worker.asked.append(self.method)
        return Ref(self.worker, self.method)


class Worker:
    """An actor handle: any method of it can be called."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.asked: list[str] = []

    def __getattr__(self, method: str) -> Call:
        return Call(self, method)


@dataclass
class Ray:
    """Nodes by name, of which some may be dead; `answer` gives what a call returns, or None while it runs."""

    nodes_up: Sequence[str]
    answer: Callable[[Ref], Any]
    dead: set[str] = field(default_factory=set)  # their workers' calls fail
    unnoticed: set[str] = field(default_factory=set)  # dead, but still shown as alive
    last_words: set[str] = field(default_factory=set)  # methods that their workers answer before they die
    each_wait: Callable[[float], None] = lambda timeout_s: None
    exceptions: ClassVar[Any] = SimpleNamespace(RayError=RayError, GetTimeoutError=GetTimeoutError)

    def nodes(self) -> list[dict[str, Any]]:
        gone = self.dead - self.unnoticed
        return [
            {"NodeID": name, "Alive": name not in gone, "NodeManagerHostname": name, "Resources": {"CPU": 8.0}}
            for name in self.nodes_up
        ]

    def wait(self, refs: list[Ref], num_returns: int = 1, timeout: float = 0.0) -> tuple[list[Ref], list[Ref]]:
        self.each_wait(timeout)
        ended = [ref for ref in refs if self._ended(ref)]
        return ended, [ref for ref in refs if ref not in ended]

    def get(self, asked: Any, timeout: float | None = None) -> Any:
        if isinstance(asked, list):
            return [self.get(ref) for ref in asked]
        if self._lost(asked):
            raise RayError("The actor died because its node has died.")
        if self.answer(asked) is None:
            raise GetTimeoutError(f"{asked.method} has not ended")
        return self.answer(asked)

    def put(self, value: Any) -> Any:
        return value

    def kill(self, worker: Worker) -> None:
        worker.asked.append("killed")

    def _ended(self, ref: Ref) -> bool:
        return self._lost(ref) or self.answer(ref) is not None

    def _lost(self, ref: Ref) -> bool:
        return ref.worker.node in self.dead and ref.method not in self.last_words
