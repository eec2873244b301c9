from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from grappa_dist.dist import checkpoints
from grappa_dist.dist.checkpoints import RowShard, load_checkpoint, save_checkpoint
from grappa_dist.dist.comm import Comm
from tests.stages.tiny import Watcher

ALL_ROWS = torch.arange(23 * 4, dtype=torch.float32).reshape(23, 4)
STEPS = torch.arange(23, dtype=torch.int32)


def save(folder: Path, step: int, parts: list[tuple[int, int]]) -> None:
    """What ranks with these row ranges write, all of them played by one."""
    shards = {f"set.{i}": RowShard(a, {"rows": ALL_ROWS[a:b], "steps": STEPS[a:b]}) for i, (a, b) in enumerate(parts)}
    module = nn.Linear(2, 1)
    state = torch.optim.Adam(module.parameters()).state
    save_checkpoint(Watcher().context(Comm()), folder, step, module, state, shards)
    for path in (folder / "checkpoints" / f"step-{step:09d}").glob("set.*"):
        path.rename(path.with_name("classifier." + path.name.split(".", 2)[2]))


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
