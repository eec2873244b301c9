from __future__ import annotations

from collections.abc import Iterator

import torch

from grappa_dist.search.in_flight import Arriving, a_step_later


def test_items_are_given_when_the_next_one_is_there_in_their_order() -> None:
    log = list[tuple[str, int]]()

    def made() -> Iterator[int]:
        for number in range(3):
            log.append(("made", number))
            yield number

    for number in a_step_later(made()):
        log.append(("taken", number))
    assert log == [("made", 0), ("made", 1), ("taken", 0), ("made", 2), ("taken", 1), ("taken", 2)]
    assert list(a_step_later(iter(()))) == []


def test_a_tensor_of_the_host_has_arrived() -> None:
    tensor = torch.arange(3)
    assert Arriving.of(tensor).take() is tensor
