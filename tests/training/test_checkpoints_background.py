from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from grappa_dist.distributed.collectives import Comm
from grappa_dist.training import checkpoints
from grappa_dist.training.checkpoints import CheckpointWriter, RowShard, load_checkpoint, save_checkpoint
from tests.processes import run_ranks
from tests.stages.tiny import Watcher

ROWS = torch.arange(23 * 4, dtype=torch.float32).reshape(23, 4)


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    module = nn.Linear(3, 2)
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.fill_(number + 0.5)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return module, optimizer


def shard_of(comm: Comm) -> RowShard:
    first, end = (len(ROWS) * rank // comm.size for rank in (comm.rank, comm.rank + 1))
    return RowShard(first, {"rows": ROWS[first:end].clone()})


def content(folder: Path) -> dict[str, Any]:
    """What files of a folder hold, by name: metadata, which safetensors writes in any order, and bytes of tensors."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118
            found[path.name] = (file.metadata(), tensors)
    sums = json.loads((folder / "checkpoints" / "step-000000007" / checkpoints.SUMS_FILE).read_text())
    return found | {checkpoints.SUMS_FILE: sums["files"].keys()}


def write_both_ways(comm: Comm, folder: Path) -> bool:
    """One checkpoint at once, and one by a thread, while the state that it was begun with is overwritten; whether
    nothing was to be found in between."""
    checkpoints._FILE_BYTES = 64  # several files of rows
    module, optimizer = trained()
    shard = shard_of(comm)
    context = Watcher().context(comm)
    save_checkpoint(context, folder / "at-once", 7, module, optimizer.state, {"classifier": shard})
    with CheckpointWriter(context, folder / "beside", background=True) as writer:
        writer.begin(7, module, optimizer.state, {"classifier": shard})
        with torch.no_grad():
            for tensor in (*module.parameters(), *shard.tensors.values()):
                tensor.fill_(torch.nan)
        hidden = load_checkpoint(context, folder / "beside", *trained(), {"classifier": shard_of(comm)}) == 0
        assert writer.under_way
        writer.finish()
        assert not writer.under_way
    return hidden


@pytest.mark.parametrize("size", [1, 2])
def test_a_checkpoint_written_beside_training_has_the_content_of_one_at_once(tmp_path: Path, size: int) -> None:
    assert run_ranks(write_both_ways, size, tmp_path) == [True] * size
    at_once, beside = content(tmp_path / "at-once"), content(tmp_path / "beside")
    assert at_once == beside
    assert len(at_once) == 2 + sum(-(-rows // 4) for rows in ([23] if size == 1 else [11, 12]))


class Held:
    """A writer of files that waits for its event, and may then fail."""

    def __init__(self, error: Exception | None = None) -> None:
        self.go, self._error, self._write = threading.Event(), error, checkpoints._write

    def __call__(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
        assert self.go.wait(20)
        if self._error is not None:
            raise self._error
        return self._write(path, tensors, metadata)


def test_training_goes_on_while_a_checkpoint_is_written_and_knows_when_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, optimizer = trained()
    save_checkpoint(Watcher().context(Comm()), tmp_path, 3, module, optimizer.state)
    held = Held()
    monkeypatch.setattr(checkpoints, "_write", held)
    with CheckpointWriter(Watcher().context(Comm()), tmp_path, background=True) as writer:
        assert writer.written()
        writer.begin(5, module, optimizer.state)
        assert not writer.written()
        assert load_checkpoint(Watcher().context(Comm()), tmp_path, *trained()) == 3  # what a kill leaves
        held.go.set()
        writer.finish()
        assert writer.written()
    assert load_checkpoint(Watcher().context(Comm()), tmp_path, *trained()) == 5


def test_what_prevents_the_writer_comes_up_when_the_checkpoint_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, optimizer = trained()
    save_checkpoint(Watcher().context(Comm()), tmp_path, 3, module, optimizer.state)
    held = Held(OSError(28, "No space left on device"))
    held.go.set()
    monkeypatch.setattr(checkpoints, "_write", held)
    with CheckpointWriter(Watcher().context(Comm()), tmp_path, background=True) as writer:
        writer.begin(5, module, optimizer.state)
        with pytest.raises(OSError, match="No space left"):
            writer.finish()
    assert load_checkpoint(Watcher().context(Comm()), tmp_path, *trained()) == 3


FAILING = {"make_folder": 0, "_write": 1, "rename": 0}  # on this rank


def fail_on_one_rank(comm: Comm, folder: Path) -> list[tuple[str, int]]:
    """What a rank raises, and the checkpoint that there is then, where one rank cannot do a part of its work."""
    found, context = [], Watcher().context(comm)
    for background in (False, True):
        for name, rank in FAILING.items():
            own = folder / f"{name}-{background}"
            module, optimizer = trained()
            save_checkpoint(context, own, 3, module, optimizer.state, {"classifier": shard_of(comm)})
            with pytest.MonkeyPatch.context() as patch:
                if comm.rank == rank:
                    patch.setattr(checkpoints, name, full_disk)
                with pytest.raises((OSError, RuntimeError)) as error:
                    write_one(comm, own, background=background)
            step = load_checkpoint(context, own, *trained(), {"classifier": shard_of(comm)})
            found.append((f"{type(error.value).__name__}: {error.value}", step))
    return found


def write_one(comm: Comm, folder: Path, *, background: bool) -> None:
    module, optimizer = trained()
    with CheckpointWriter(Watcher().context(comm), folder, background=background) as writer:
        writer.begin(5, module, optimizer.state, {"classifier": shard_of(comm)})
        writer.finish()


def full_disk(*args: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_rank_that_cannot_write_is_waited_for_by_none_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    ranks = run_ranks(fail_on_one_rank, 2, tmp_path, timeout_s=60, collective_s=10)
    full = "OSError: [Errno 28] No space left on device"
    for case, at in enumerate([*FAILING.values()] * 2):
        assert ranks[at][case] == (full, 3)
        assert ranks[1 - at][case] == (f"RuntimeError: rank {at} failed: {full}", 3)


def test_a_checkpoint_that_is_not_finished_never_appears(tmp_path: Path) -> None:
    module, optimizer = trained()
    with CheckpointWriter(Watcher().context(Comm()), tmp_path, background=True) as writer:
        writer.begin(5, module, optimizer.state)
    assert load_checkpoint(Watcher().context(Comm()), tmp_path, *trained()) == 0
    save_checkpoint(Watcher().context(Comm()), tmp_path, 6, module, optimizer.state)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000006"]


def test_the_copy_of_a_later_checkpoint_is_in_the_same_memory(tmp_path: Path) -> None:
    module, optimizer = trained()
    with CheckpointWriter(Watcher().context(Comm()), tmp_path, background=True) as writer:
        places = []
        for step in (1, 2):
            writer.begin(step, module, optimizer.state)
            writer.finish()
            places.append({name: tensor.data_ptr() for name, tensor in writer._buffers.items()})
        assert places[0] == places[1]
        assert len(places[0]) == 2 + 2 * 3
