from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
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
        list(ranks.map(one, [Played(rank, len(parts), meeting=meeting, given=given) for rank in range(len(parts))]))


def load(folder: Path, first: int, end: int, notes: list[str] | None = None) -> tuple[int, dict[str, Tensor]]:
    ((step, tensors),) = load_together(folder, [(first, end)], notes)
    return step, tensors


def load_together(
    folder: Path, parts: list[tuple[int, int]], notes: list[str] | None = None
) -> list[tuple[int, dict[str, Tensor]]]:
    """What ranks with these row ranges load, and in `notes` what they note."""

    def one(comm: Comm) -> tuple[int, dict[str, Tensor]]:
        a, b = parts[comm.rank]
        tensors = {"rows": torch.full((b - a, 4), torch.nan), "steps": torch.zeros(b - a, dtype=torch.int32)}
        module = nn.Linear(2, 1)
        optimizer = torch.optim.Adam(module.parameters())
        context = replace(Watcher().context(comm), note=([] if notes is None else notes).append)
        return load_checkpoint(context, folder, module, optimizer, {"classifier": RowShard(a, tensors)}), tensors

    meeting, given = threading.Barrier(len(parts)), dict[int, Tensor]()
    with ThreadPoolExecutor(len(parts)) as ranks:
        return list(
            ranks.map(one, [Played(rank, len(parts), meeting=meeting, given=given) for rank in range(len(parts))])
        )


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
    assert len(list((tmp_path / "checkpoints" / "step-000000006").iterdir())) == 3  # rows, engine, checksums
    assert not partial.exists()


def test_a_checkpoint_under_its_name_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Power(BaseException):
        pass

    written = list[str]()

    def fails(path: Path, *args: object) -> str:
        written.append(path.name)
        if len(written) == 2:
            raise Power
        return "0" * 32

    monkeypatch.setattr(checkpoints, "_write", fails)
    with pytest.raises(Power):
        save(tmp_path, 5, [(0, 23)])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [".step-000000005.partial"]
    assert load(tmp_path, 0, 23)[0] == 0


def flip(path: Path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 16
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def of_another_version(path: Path) -> None:
    save_file(load_file(path), path, metadata={"step": "6"})


ENGINE = "step-000000006/engine.safetensors"
ROWS = "step-000000006/classifier.000000000011-000000000023.safetensors"
SUMS = "step-000000006/checksums.json"
DAMAGES: list[tuple[str, Callable[[Path], object]]] = [
    *((name, damage) for name in (ENGINE, ROWS, SUMS) for damage in (flip, cut, zero)),
    *((name, Path.unlink) for name in (ENGINE, ROWS)),
    (ENGINE, of_another_version),
    ("step-000000006", shutil.rmtree),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
@pytest.mark.parametrize("size", [1, 3])
def test_a_damaged_checkpoint_is_set_aside_and_named_and_the_one_before_is_loaded(
    tmp_path: Path, name: str, damage: Callable[[Path], object], size: int
) -> None:
    for step in (5, 6):
        save(tmp_path, step, [(0, 11), (11, 23)])
    found, notes = tmp_path / "checkpoints", list[str]()
    damage(found / name)
    if not (found / "step-000000006").exists():
        (found / "step-000000006").mkdir()  # empty
    parts = [(23 * rank // size, 23 * (rank + 1) // size) for rank in range(size)]
    for (first, end), (step, tensors) in zip(parts, load_together(tmp_path, parts, notes), strict=True):
        assert step == 5
        assert torch.equal(tensors["rows"], ALL_ROWS[first:end])
    assert sorted(path.name for path in found.iterdir()) == [".damaged-step-000000006-1", "step-000000005"]
    assert len(notes) == 1
    assert f"checkpoint {found / 'step-000000006'} is not used: " in notes[0]
    assert "set aside as .damaged-step-000000006-1" in notes[0]
    save(tmp_path, 6, [(0, 23)])
    assert load(tmp_path, 0, 23)[0] == 6


def test_without_a_whole_checkpoint_training_begins_anew(tmp_path: Path) -> None:
    for step in (5, 6):
        save(tmp_path, step, [(0, 23)])
        cut(tmp_path / "checkpoints" / f"step-{step:09d}" / checkpoints.ENGINE_FILE)
    notes = list[str]()
    assert load(tmp_path, 0, 23, notes)[0] == 0
    assert len(notes) == 2


def test_a_checkpoint_of_another_job_is_not_loaded(tmp_path: Path) -> None:
    save(tmp_path / "k=8", 5, [(0, 23)])
    shutil.copytree(tmp_path / "k=8", tmp_path / "k=24")
    notes = list[str]()
    assert load(tmp_path / "k=24", 0, 23, notes)[0] == 0
    assert "it was written for k=8" in notes[0]


def test_a_checkpoint_of_an_earlier_version_that_had_no_checksums_is_loaded(tmp_path: Path) -> None:
    save(tmp_path, 5, [(0, 11), (11, 23)])
    (tmp_path / "checkpoints" / "step-000000005" / checkpoints.SUMS_FILE).unlink()
    step, found = load(tmp_path, 0, 23)
    assert step == 5
    assert torch.equal(found["rows"], ALL_ROWS)


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
    load_checkpoint(Watcher().context(Comm()), tmp_path, other, restored)
    for known in restored.state.values():
        assert known["step"].device.type == device
        assert known["exp_avg"].device.type == "meta"
