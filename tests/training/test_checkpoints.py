from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grappa_dist.distributed.collectives import Comm
from grappa_dist.training import checkpoints
from grappa_dist.training.checkpoints import RowShard, load_checkpoint, save_checkpoint
from tests.stages.tiny import Watcher

ALL_ROWS = torch.arange(23 * 4, dtype=torch.float32).reshape(23, 4)
STEPS = torch.arange(23, dtype=torch.int32)


@dataclass(frozen=True)
class Played(Comm):
    """One of several ranks, as a thread: they gather and meet at barriers as processes do."""

    meeting: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))
    given: dict[int, Tensor] = field(default_factory=dict)

    def barrier(self) -> None:
        self.meeting.wait(20)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        self.given[self.rank] = tensor
        self.barrier()
        found = [self.given[rank] for rank in range(self.size)]
        self.barrier()
        return found


def save(folder: Path, step: int, parts: list[tuple[int, int]]) -> None:
    """What ranks with these row ranges write."""
    module = nn.Linear(2, 1)
    state = torch.optim.Adam(module.parameters()).state

    def one(comm: Comm) -> None:
        a, b = parts[comm.rank]
        shards = {"classifier": RowShard(a, {"rows": ALL_ROWS[a:b], "steps": STEPS[a:b]})}
        save_checkpoint(Watcher().context(comm), folder, step, module, state, shards)

    meeting, given = threading.Barrier(len(parts)), dict[int, Tensor]()
    with ThreadPoolExecutor(len(parts)) as ranks:
        list(ranks.map(one, [Played(rank, len(parts), meeting, given) for rank in range(len(parts))]))


def load(folder: Path, first: int, end: int) -> tuple[int, dict[str, Tensor]]:
    tensors = {"rows": torch.full((end - first, 4), torch.nan), "steps": torch.zeros(end - first, dtype=torch.int32)}
    module = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(module.parameters())
    return load_checkpoint(folder, module, optimizer, {"classifier": RowShard(first, tensors)}), tensors


@pytest.mark.parametrize(
    "parts", [[(0, 23)], [(0, 11), (11, 23)], [(0, 0), (0, 1), (1, 23)], [(0, 7), (7, 15), (15, 23)]]
)
@pytest.mark.parametrize("file_rows", [1, 4, 100])
def test_rows_load_from_any_split_into_any_other(
    tmp_path: Path, parts: list[tuple[int, int]], file_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_FILE_BYTES", 20 * file_rows)
    save(tmp_path, 5, parts)
    for first, end in [(0, 23), (3, 20), (7, 7), (22, 23)]:
        step, found = load(tmp_path, first, end)
        assert step == 5
        assert torch.equal(found["rows"], ALL_ROWS[first:end])
        assert torch.equal(found["steps"], STEPS[first:end])


def test_what_a_killed_attempt_left_is_neither_loaded_nor_taken_over(tmp_path: Path) -> None:
    save(tmp_path, 5, [(0, 23)])
    partial = tmp_path / "checkpoints" / ".step-000000006.partial"
    partial.mkdir()
    (partial / "classifier.000000000000-000000000007.safetensors").write_bytes(b"cut")
    assert load(tmp_path, 0, 23)[0] == 5
    save(tmp_path, 6, [(0, 23)])
    assert load(tmp_path, 0, 23)[0] == 6
    assert len(list((tmp_path / "checkpoints" / "step-000000006").iterdir())) == 2  # rows and engine
    assert not partial.exists()


def test_a_checkpoint_under_its_name_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Power(BaseException):
        pass

    written = list[str]()

    def fails(path: Path, *args: object) -> None:
        written.append(path.name)
        if len(written) == 2:
            raise Power

    monkeypatch.setattr(checkpoints, "_write", fails)
    with pytest.raises(Power):
        save(tmp_path, 5, [(0, 23)])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [".step-000000005.partial"]
    assert load(tmp_path, 0, 23)[0] == 0


def test_a_checkpoint_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path, 5, [(0, 23)])
    file = tmp_path / "checkpoints" / "step-000000005" / checkpoints.ENGINE_FILE
    save_file(load_file(file), file, metadata={"step": "5"})
    with pytest.raises(ValueError, match=r"step-000000005 was not written by this version.*remove it"):
        load(tmp_path, 0, 23)


def test_what_killed_attempts_left_goes_with_the_next_checkpoint(tmp_path: Path) -> None:
    for name in (".step-000000037.partial", ".step-000000002.old"):
        (tmp_path / "checkpoints" / name / "deep").mkdir(parents=True)
    save(tmp_path, 50, [(0, 11), (11, 23)])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000050"]


def test_a_file_of_a_straggler_with_other_rows_is_not_read(tmp_path: Path) -> None:
    save(tmp_path, 5, [(0, 11), (11, 23)])
    wrong = {"rows": torch.full((23, 4), -1.0), "steps": torch.zeros(23, dtype=torch.int32)}
    save_file(wrong, tmp_path / "checkpoints" / "step-000000005" / "classifier.000000000000-000000000023.safetensors")
    save_file(wrong, tmp_path / "checkpoints" / "step-000000005" / "classifier.000000000000-000000000005.safetensors")
    assert torch.equal(load(tmp_path, 0, 23)[1]["rows"], ALL_ROWS)


def test_a_checkpoint_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = list[str]()
    monkeypatch.setattr(checkpoints, "sync", lambda path: synced.append(path.name))
    save(tmp_path, 5, [(0, 23)])
    assert synced == [".step-000000005.partial", "checkpoints"]


@pytest.mark.parametrize(("setting", "device"), [("capturable", "meta"), ("fused", "meta"), (None, "cpu")])
def test_numbers_of_an_optimizer_are_loaded_onto_the_device_that_it_needs(
    tmp_path: Path, setting: str | None, device: str
) -> None:
    module = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save_checkpoint(Watcher().context(Comm()), tmp_path, 1, module, optimizer.state)
    other = nn.Linear(2, 1, device="meta")  # stands for a GPU
    restored = torch.optim.Adam(other.parameters())
    restored.param_groups[0] |= {setting: True} if setting else {}
    load_checkpoint(tmp_path, other, restored)
    for known in restored.state.values():
        assert known["step"].device.type == device
        assert known["exp_avg"].device.type == "meta"
