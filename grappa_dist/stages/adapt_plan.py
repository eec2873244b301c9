"""What adapt would do, in words, before anything runs: jobs, what waits for what, and the memory of a step."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from grappa_dist.config import Config
from grappa_dist.console import counted
from grappa_dist.distributed.placement import check_capacity, placement_in_words
from grappa_dist.models import Backbone, PackedGrappa
from grappa_dist.stages.expected_workers import known_workers, may_have_gpus, ranks_of
from grappa_dist.training.batches import rank_share
from grappa_dist.training.memory import image_bytes, images_at_a_time


def jobs_in_words(config: Config, num_sets: int) -> str:
    per_job, ranks = config.adapt.sets_per_job, ranks_of(config.resources, known_workers(config.resources))
    if per_job == "auto":
        return f"{counted(num_sets, 'set')} in jobs of {counted(ranks, 'rank')}, as many to a job as measured rates say"
    packed = f"{counted(num_sets, 'set')} in " if per_job > 1 else ""
    return f"{packed}{counted(-(-num_sets // per_job), 'job')} of {counted(ranks, 'rank')}"


def adapt_in_words(config: Config, num_sets: int, backbone: Backbone | None) -> Iterator[str]:
    """What waits for what, where the number of workers is known; the activations of a step, where the model is.

    Args:
        backbone: without weights; it is left as it is.

    Raises:
        ValueError: a job has more ranks than there are workers.
    """
    per_job, workers = config.adapt.sets_per_job, known_workers(config.resources)
    ranks = ranks_of(config.resources, workers)
    if workers is not None:
        check_capacity(workers, ranks)
    if workers is not None and per_job != "auto":
        yield f"on {workers} workers: {placement_in_words(-(-num_sets // per_job), workers, ranks)}"
    if backbone is not None:
        if per_job == "auto":
            of_one = _memory_in_words(config, backbone, 1, ranks)
            yield f"{of_one}; counted for one set, of which auto may put several in a job"
        else:
            yield _memory_in_words(config, backbone, min(per_job, num_sets), ranks)


def _memory_in_words(config: Config, backbone: Backbone, num_sets: int, ranks: int) -> str:
    """What an image takes of a rank in a step, counted on a model without weights as `fitting` does on the real one."""
    adapt = config.adapt
    with torch.device("meta"):
        model = PackedGrappa(copy.deepcopy(backbone), 1, adapt.bottleneck)  # which wraps the blocks in place
    sparing = adapt.activation_checkpointing
    each, other = (image_bytes(model, recompute=recompute) for recompute in (sparing, not sparing))
    share = rank_share(adapt.global_batch, ranks, config.data.streams)
    at_once, fewer = share, "; adapt.micro_batch=auto takes fewer at a time where that does not fit"
    if adapt.micro_batch != "auto":
        on_gpu = may_have_gpus(config.resources)
        at_once, fewer = images_at_a_time(adapt.micro_batch, share, num_sets, on_gpu=on_gpu), ""
    total = each * at_once * num_sets / 2**30
    whole = f"all tokens ({model.whole_because})" if model.whole_because else "the class token alone"
    return (
        f"activations in float32, those of a layer at work among them: {each / 2**20:.1f} MiB an image and set "
        f"({other / 2**20:.1f} with{'out' * sparing} adapt.activation_checkpointing), {total:.1f} GiB a rank for "
        f"{at_once} images and {num_sets} set{'s' * (num_sets > 1)} (adapt.micro_batch lowers it)"
        f"{fewer}; the last block computes {whole}"
    )
