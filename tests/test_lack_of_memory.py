"""A full memory of a GPU ends whatever meets it with a line that names what to lower."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grappa_dist.console import Console, Ending, one_line
from grappa_dist.data.shards import ImageShards
from grappa_dist.distributed.worker import Worker
from grappa_dist.lack_of_memory import naming_lack_of_memory
from grappa_dist.models.spec import ModelSpec, build
from grappa_dist.retrieval.embedding import Embedder
from grappa_dist.retrieval.opening import OpenModel
from grappa_dist.stages.embed import Embedding, embed_rows
from tests.stages import tiny

TORCH_SAYS = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB\nand much more"


def full(*args: Any, **how: Any) -> Any:
    raise torch.OutOfMemoryError(TORCH_SAYS)


@pytest.fixture
def images(tmp_path: Path) -> ImageShards:
    return ImageShards.open(tiny.config(tiny.write_shards(tmp_path)).data.train, None)


@pytest.fixture
def model(images: ImageShards, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    settings = tiny.config([shard.path for shard in images.shards])
    found = build(ModelSpec("backbone", settings.backbone), tiny.CPU)
    monkeypatch.setattr(type(found), "forward", full)
    return found


def test_embedding_names_the_batch_size_of_a_run(images: ImageShards, model: torch.nn.Module) -> None:
    says = r"^embed: a batch of 8 images of \d+ pixels does not fit the GPU's memory: lower embed\.batch_size=8 \(CUDA"
    with pytest.raises(ValueError, match=says) as caught:
        list(embed_rows(model, images, np.arange(20), device=tiny.CPU, how=Embedding(8, 1)))
    assert "\n" not in str(caught.value)


def test_embedding_names_the_option_of_a_command(images: ImageShards, model: torch.nn.Module) -> None:
    opened = OpenModel.__new__(OpenModel)
    vars(opened).update(model=model, variant="backbone")
    with pytest.raises(ValueError, match="lower --batch-size=8"):
        Embedder(opened, Console(), 8, 1).embed(images)


def of_a_task(worker: Worker) -> None:
    worker.run(full, None)


def of_a_job(worker: Worker) -> None:
    worker.run_rank(full, None, (0, 1, "127.0.0.1:0"), 10.0)


@pytest.mark.parametrize("call", [of_a_task, of_a_job])
def test_whatever_a_worker_does_ends_for_good_and_in_one_line(
    call: Callable[[Worker], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker.__new__(Worker)
    vars(worker).update(_threads=1, _gpus=0, _status={}, _notes=[])
    monkeypatch.setattr("grappa_dist.distributed.worker.process_group", lambda *args, **how: _NoGroup())
    vars(worker)["_stop"] = _NotAsked()
    with pytest.raises(ValueError, match=r"^full does not fit the GPU's memory \(CUDA .* 79\.10 GiB\)$"):
        call(worker)


class _NoGroup:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


class _NotAsked:
    def is_set(self) -> bool:
        return False


def test_an_error_of_a_worker_names_settings_of_its_stage_and_one_of_a_command_its_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class OfRay(RuntimeError):
        __module__ = "ray.exceptions"

    error = ValueError(f"fit_rank does not fit the GPU's memory ({TORCH_SAYS.splitlines()[0]})")
    error.__cause__ = OfRay()
    error.add_note("in stage pseudo_label")
    assert one_line(error).endswith(
        "; a GPU needs less memory with smaller values of clustering.num_labels, and none with "
        "resources.gpus_per_worker=0"
    )
    assert Ending().of(full) == 1
    assert "; a smaller --batch-size takes less memory of a GPU, and --device cpu none" in capsys.readouterr().err


def test_any_other_error_stays_as_it_is() -> None:
    def broken() -> None:
        with naming_lack_of_memory("that", "lower this"):
            raise RuntimeError("a kernel is missing")

    with pytest.raises(RuntimeError, match="a kernel is missing"):
        broken()
