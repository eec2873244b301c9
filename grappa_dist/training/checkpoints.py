"""Checkpoints of training: a folder that appears by one rename, and loads on any number of ranks.

    checkpoints/step-000000050/
      engine.safetensors              what every rank has alike, and the list of the other files, written by rank 0
      <name>.<first>-<end>.safetensors    rows of what is spread over the ranks, written by the rank that holds them

Shapes: the first dimension of a shard's tensors is its rows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from grappa_dist.distributed.worker import RankContext
from grappa_dist.files import make_folder, rename, save_tensors, sync
from grappa_dist.training.deepspeed_engine import State

KEEP_CHECKPOINTS = 2
ENGINE_FILE = "engine.safetensors"
_FILE_BYTES = 256 * 2**20  # of rows: serialising makes a copy of a file's tensors


@dataclass(frozen=True)
class RowShard:
    """One rank's rows [first, first + len) of tensors that all ranks hold together, in that rank's memory."""

    first: int
    tensors: Mapping[str, Tensor]

    @property
    def end(self) -> int:
        return self.first + len(next(iter(self.tensors.values())))

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Rows of one file each, as [first, end)."""
        row_bytes = sum(t[:1].numel() * t.element_size() for t in self.tensors.values())
        step = max(1, _FILE_BYTES // max(row_bytes, 1))
        return ((start, min(start + step, self.end)) for start in range(self.first, self.end, step))


def save_checkpoint(
    context: RankContext,
    folder: Path,
    step: int,
    module: nn.Module,
    state: State,
    shards: Mapping[str, RowShard] | None = None,
) -> None:
    """Trainable parameters and optimizer state of `step` finished steps, and this rank's rows of `shards`.

    The checkpoint appears when all ranks have written their part; the oldest is then removed.
    """
    done = folder / "checkpoints" / f"step-{step:09d}"
    partial = done.with_name(f".{done.name}.partial")
    files = _files_of_all(context, shards or {})
    if context.comm.rank == 0:
        for left in done.parent.glob(".step-*"):  # by killed attempts; no rank writes before the barrier below
            shutil.rmtree(left, ignore_errors=True)
        make_folder(partial)
        _write(partial / ENGINE_FILE, _replicated(module, state), {"step": str(step), "files": json.dumps(files)})
    context.comm.barrier()
    for name, shard in (shards or {}).items():
        for first, end in shard.ranges():
            rows = {key: t[first - shard.first : end - shard.first].cpu() for key, t in shard.tensors.items()}
            _write(partial / _file_name(name, first, end), rows, {})
    context.comm.barrier()
    if context.comm.rank == 0:
        sync(partial)
        rename(partial, done)
        sync(done.parent)
        for old in _checkpoints(folder)[:-KEEP_CHECKPOINTS]:
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.old")))  # a partly removed one never has that name
    context.comm.barrier()


def load_checkpoint(
    folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, shards: Mapping[str, RowShard] | None = None
) -> int:
    """Loads the newest checkpoint, if any, into module, optimizer and shards; returns its number of finished steps.

    Raises:
        ValueError: the checkpoint is of another version, or some of its rows are missing.
    """
    found = _checkpoints(folder)
    if not found:
        return 0
    with safe_open(found[-1] / ENGINE_FILE, framework="pt") as file, torch.no_grad():
        on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        saved = sorted(file.keys())  # one order on all ranks: gathering a state sums it entry by entry
        for name, p in _trainable(module).items():
            p.copy_(file.get_tensor(name))
            state = {key.split("|")[1]: file.get_tensor(key) for key in saved if key.startswith(f"{name}|")}
            optimizer.state[p] = {k: v.to(p.device) if v.ndim or on_device else v for k, v in state.items()}
        metadata = file.metadata() or {}
    if not {"step", "files"} <= metadata.keys():
        raise ValueError(f"{found[-1]} was not written by this version of grappa_dist; remove it to train anew")
    step, files = int(metadata["step"]), json.loads(metadata["files"])
    for name, shard in (shards or {}).items():
        _load_rows(found[-1], [file for file in files if file.startswith(f"{name}.")], name, shard)
    return step


def oldest_step(folder: Path) -> int:
    """The step of the oldest checkpoint that is kept, from which a restart may go on; 0 where there is none."""
    return min((int(path.name.removeprefix("step-")) for path in _checkpoints(folder)), default=0)


def _files_of_all(context: RankContext, shards: Mapping[str, RowShard]) -> list[str]:
    """The names of all ranks' files, without any that a late rank of an earlier attempt may add."""
    files = list[str]()
    for name, shard in shards.items():
        own = torch.tensor(list(shard.ranges()), dtype=torch.int64, device=context.device).reshape(-1, 2)
        ranges = torch.cat(context.comm.gather(own)).tolist()
        files += [_file_name(name, first, end) for first, end in ranges]
    return files


def _file_name(shard: str, first: int, end: int) -> str:
    return f"{shard}.{first:012d}-{end:012d}.safetensors"


@torch.no_grad()
def _load_rows(checkpoint: Path, files: Sequence[str], name: str, shard: RowShard) -> None:
    """Fills a rank's rows from the files that have them.

    Raises:
        ValueError: no file has some of the rows.
    """
    reached = shard.first
    for path in (checkpoint / file for file in sorted(files)):
        first, end = (int(number) for number in path.suffixes[-2].removeprefix(".").split("-"))
        low, high = max(first, reached), min(end, shard.end)
        if low != reached or low >= high or not path.exists():
            continue
        with safe_open(path, framework="pt") as file:
            for key, tensor in shard.tensors.items():
                tensor[low - shard.first : high - shard.first] = file.get_slice(key)[low - first : high - first]
        reached = high
    if reached < shard.end:
        raise ValueError(f"{checkpoint} has no row {reached} of {name}; remove it to go on from the one before")


def _replicated(module: nn.Module, state: State) -> dict[str, Tensor]:
    tensors = {name: p.detach().cpu() for name, p in _trainable(module).items()}
    for name, p in _trainable(module).items():
        tensors |= {f"{name}|{key}": v.cpu() for key, v in state[p].items() if isinstance(v, Tensor)}
    return tensors


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    save_tensors(path, tensors, metadata)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step-*[0-9]"))


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
