"""What a run would do: how long it takes, its stages, what is reused, jobs with their workers and steps, sizes.

Writes nothing. Where a run has tried the backbone and stored its sizes, nothing is built: importing timm takes longer
than all the rest. Else a timm backbone is built without its weights, which gives its shapes, and any other one only
where it is measured: without that its number of channels is known only where features exist.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from grappa_dist.artifacts import Artifact, Store, finished
from grappa_dist.config import AUTO, BackboneConfig, Config, Resources
from grappa_dist.console import format_bytes, format_number, pluralize
from grappa_dist.data.open_images import ROWS_PER_SHARD as GENERATED_PER_SHARD
from grappa_dist.data.open_images import generated_sizes, is_generated, open_images
from grappa_dist.distributed.placement import (
    WorkerParts,
    check_capacity,
    describe_placement,
    known_workers,
    may_have_gpus,
    ranks_of,
)
from grappa_dist.estimate import (
    CLASSIFIER_PRODUCTS,
    Estimator,
    centroid_bytes,
    centroid_slices,
    describe_seconds,
    dominating,
    needs,
    work_ahead,
    work_of,
)
from grappa_dist.files import map_array
from grappa_dist.inputs import Inputs, look
from grappa_dist.inputs.growing import images_per_shard
from grappa_dist.layout import lay_out, on_pairs
from grappa_dist.models import Backbone
from grappa_dist.models.backbone import check_name, check_weights
from grappa_dist.models.spec import build_backbone, check_checkpoint
from grappa_dist.models.trial import Verdict, check_shapes, known_verdict
from grappa_dist.progress import duration
from grappa_dist.rates import SAMPLES, Rates, measure, some_images, stored_rates
from grappa_dist.stages.bad_rows import check_bad_share
from grappa_dist.stages.embed import ROWS_FILE
from grappa_dist.stages.flow import Flow
from grappa_dist.stages.fuse import describe_unfused, projector_bytes
from grappa_dist.stages.knn_graph import graph_kind
from grappa_dist.stages.pseudo_label import check_slices, describe_choices, num_labels
from grappa_dist.stages.run import place_of
from grappa_dist.training.barlow_twins_loss import by_rows_cost, rows_are_cheaper, whole_cost
from grappa_dist.training.batches import describe_idle_ranks, rank_share, steps_per_epoch
from grappa_dist.training.memory import ModelSizes, micro_batch_size
from grappa_dist.variants import SUPERVISED, SUPERVISED_SET, Variant

DIM = 384  # channels for which sizes are given where the backbone's are not known
CORE_FLOPS = 3.7e10  # rate of a CPU core in the classifier, Adam included; measured, docs/scale.md


def plan(config: Config, root: Path, *, measured: bool = False) -> str:
    """The plan and the resolved config, as text. Writes nothing.

    Args:
        measured: whether this machine is measured, for some ten seconds, where no run has stored its rates; without
            rates the plan does not say how long the run takes.
    """
    tried = known_verdict(config.backbone, root / "index")
    if tried is None:
        check_name(config.backbone.name, config.backbone.kwargs)
    return f"{_table(config, root, tried, measured=measured)}\n\n{config.yaml()}"


@dataclass(frozen=True)
class _Images:
    """The images of a run, and what is there of it: nothing where they are in no shards yet."""

    sizes: Mapping[str, int]  # train and test
    flow: Flow | None = None
    missing: int = 0  # images of which shards are to be made
    files: Sequence[bytes] = ()  # of some of them

    @property
    def mean_bytes(self) -> int:
        return sum(map(len, self.files)) // max(1, len(self.files))


def _images(config: Config, store: Store, inputs: Inputs, lines: list[str]) -> _Images:
    if inputs.missing:
        lines.append(f"shards         to be made of {pluralize(inputs.missing, 'image')}, once")
        sizes = inputs.sizes if config.has_test else {**inputs.sizes, "test": inputs.sizes["train"]}
        return _Images(sizes, missing=inputs.missing, files=inputs.some_files(SAMPLES))
    if not is_generated(config.data, store):
        sizes = generated_sizes(config.data)
        lines.append(
            f"load           {config.data.collection} generates {sizes['train']:,} training and {sizes['test']:,} test "
            "images"
        )
        return _Images(sizes)
    warnings = list[str]()
    train, test = open_images(config.data, store, config.resources, write_index=False, log=warnings.append)
    lines += warnings
    check_bad_share(train, {}, config.data.max_bad_share)
    flow = lay_out(config, store, train, test)
    check_bad_share(flow.test, {}, config.data.max_bad_share)
    return _Images({"train": len(train), "test": len(flow.test)}, flow, files=some_images(train))


def _table(config: Config, root: Path, tried: Verdict | None, *, measured: bool) -> str:
    lines = [f"run directory  {place_of(root)}", f"workers        {_workers(config.resources)}"]
    backbone = _without_weights(config.backbone) if tried is None else None
    inputs = look(config, root, log=lines.append)
    config = _to_be(inputs)
    images = _images(config, Store(root), inputs, lines)
    sizes, flow = images.sizes, images.flow
    check_slices(config.resources, flow.labels.values() if flow else None, len(flow.train.shards) if flow else None)
    ks = num_labels(config.clustering, sizes["train"])
    rates, how = stored_rates(root, config, len(ks)), "by rates that were measured here before"
    if rates is None and measured:
        built = build_backbone(config.backbone, pretrained=False)
        rates = measure(config, len(ks), built, images.files, fuses=bool(on_pairs(config, len(ks))))
        how = f"by rates measured on this machine in {duration(rates.measured_s)}"
    model = rates.sizes if rates is not None else _model_sizes(config, backbone)
    width = _known_width(model, flow.features if flow else ())
    dim = width or DIM
    lines += [*_describe_backbone(config.backbone, model, width), *_look_ahead(config, tried)]
    if rates is not None:
        lines += _takes(config, root, images, rates, dim, how)
    for name, text, artifacts in _stages(config, flow, sizes, ks, dim):
        makes = name != "fuse" or bool(on_pairs(config, len(ks)))
        lines.append(f"{name:<14} {text}; {_reuse(artifacts)}" if makes else f"{name:<14} {text}")
        if name == "pseudo_label":
            lines += [f"{'':<14} {line}" for line in describe_choices(config.clustering, ks, sizes["train"])]
        if name == "adapt":
            lines += [f"{'':<14} {line}" for line in _describe_adapt(config, len(ks), model)]
        if idle := describe_idle_ranks(config.data, _ranks_of_stage(name, config.resources)):
            lines.append(f"{'':<14} {idle}")
    return "\n".join([*lines, *_costs(config, sizes["train"], ks, dim), _classifiers(config, ks, dim)])


def _to_be(inputs: Inputs) -> Config:
    """The settings with shards as their data or, while shards are missing, with the test images that there will be."""
    if not inputs.missing:
        return inputs.config
    test = tuple(entry.name for entry in inputs.test)
    return inputs.given.model_copy(update={"data": inputs.given.data.model_copy(update={"test": test})})


def _takes(config: Config, root: Path, images: _Images, rates: Rates, dim: int, how: str) -> Iterator[str]:
    """How long the run takes and what it needs, and warnings.

    Args:
        how: the rates are known.
    """
    if images.flow is not None:
        work = work_of(images.flow)
    else:
        rows_per_shard = GENERATED_PER_SHARD if config.data.collection else images_per_shard(images.sizes["train"])
        work = work_ahead(config, images.sizes, sharded=images.missing, rows_per_shard=rows_per_shard)
    estimator = Estimator(config, work, rates, dim)
    total, of_stages = describe_seconds(estimator)
    other = "; the machines of the cluster may be others, and more" if os.environ.get("RAY_ADDRESS") else ""
    yield f"time           {total}, {how}{other}"
    yield f"{'':<14} {of_stages}"
    yield from needs(estimator, root, sharded_bytes=images.missing * images.mean_bytes).lines()
    if warning := dominating(estimator):
        yield warning


def _ranks_of_stage(stage: str, where: Resources) -> int:
    """Ranks of a job of a stage that trains; 0 if they are not known."""
    workers = known_workers(where)
    return {"adapt": ranks_of(where, workers), "fuse": workers or 0}.get(stage, 0)


def _stages(
    config: Config, flow: Flow | None, sizes: Mapping[str, int], ks: tuple[int, ...], dim: int
) -> Iterable[tuple[str, str, list[Artifact]]]:
    adapt_steps = config.adapt.epochs * steps_per_epoch(sizes["train"], config.adapt.global_batch)
    features = list(flow.features) if flow else []
    if config.data.exclude:
        found = [artifact for artifact in flow.excluded if artifact is not None] if flow else []
        yield "exclude", f"images that {', '.join(config.data.exclude)} lists, found by their names", found
    yield "embed", f"{pluralize(sizes['train'], 'training image')}, shard by shard", features
    yield "pseudo_label", f"K = {', '.join(map(str, ks))}; one job", list(flow.labels.values()) if flow else []
    what = "how consecutive K agree, sample clusters of each; one task"
    yield "partitions", what, [flow.partitions] if flow else []
    steps = f"{pluralize(adapt_steps, 'step')} of {config.adapt.global_batch} images each"
    yield "adapt", f"{_describe_jobs(config, len(ks))}, {steps}", list(flow.adaptors.values()) if flow else []
    yield from _supervised_stages(config, flow, ks, adapt_steps)
    yield "fuse", _describe_fuse(config, ks, sizes["train"]), list(flow.on_pairs.values()) if flow else []
    models = 1 + len(ks) + len(config.fused) + config.adapt.supervised
    scores = list(flow.scores.values()) if flow else []
    looked_at = "images" if config.has_test else "training images, as there is no data.test"
    features_bytes = format_bytes(4 * dim * models * sizes["test"])
    what = f"{models} models on {sizes['test']:,} {looked_at}, {features_bytes} of features"
    yield "evaluate", what, scores
    yield (
        "report, model",
        f"report/report.html, report/metrics.json, model/ ({_describe_exported(config)})",
        [flow.report, flow.model] if flow else [],
    )


def _describe_exported(config: Config) -> str:
    if config.evaluate.export == AUTO and config.has_test:
        return f"the best on half of the labelled test queries; without labels, {config.exported}"
    return config.exported


def _workers(where: Resources) -> str:
    gpus = "a GPU where there are GPUs" if where.gpus_per_worker == "auto" else f"{where.gpus_per_worker:g} GPU"
    count = "as many as the cluster holds" if where.workers == "auto" else str(where.workers)
    parts = WorkerParts.here(where)
    cpus, reading = f"{parts.cpus} CPU", pluralize(parts.decode_threads, "thread")
    if may_have_gpus(where) and os.environ.get("RAY_ADDRESS"):  # its nodes are not known yet
        cpus = "a GPU's part of its node's CPUs (1 without GPUs)" if where.cpus_per_worker == "auto" else cpus
        reading = "as many threads (2 without GPUs)" if where.decode_threads == "auto" else reading
    return f"{count}, each with {cpus} and {gpus}; {reading} of each read ahead"


def _without_weights(config: BackboneConfig) -> Backbone | None:
    """A timm model on the meta device, without weights; None for any other backbone, which a plan does not build.

    Raises:
        ValueError: the model does not take images of that size.
    """
    if not config.name.startswith("timm:"):
        return None
    with torch.device("meta"):
        backbone = build_backbone(config, pretrained=False)
        check_shapes(config, backbone)
    return backbone


def _model_sizes(config: Config, backbone: Backbone | None) -> ModelSizes | None:
    """Of a timm model, which is built where it is not given; None for any other backbone."""
    backbone = backbone or _without_weights(config.backbone)
    return None if backbone is None else ModelSizes.of(backbone, config.adapt.bottleneck)


def _describe_backbone(config: BackboneConfig, sizes: ModelSizes | None, width: int | None) -> Iterator[str]:
    """Channels and preprocessing of a known backbone, with the values that the settings leave to timm.

    Args:
        width: channels, if they are known.
    """
    if sizes is not None:
        yield (
            f"backbone       {config.name}: {sizes.channels} channels; image_size={sizes.image_size}, "
            f"resize={sizes.resize}, interpolation={sizes.interpolation}"
        )
    elif width is not None:
        yield f"backbone       {config.name}: {width} channels, by its features"
    else:
        yield f"backbone       {config.name}: not built for this plan; sizes below are those of {DIM} channels"


def _look_ahead(config: Config, tried: Verdict | None) -> Iterator[str]:
    """What a run would find of weights. Loads the weights of a timm model from a file, to see that they fit.

    Args:
        tried: what an earlier run has found of the backbone, whose weights it had.

    Raises:
        ValueError: the checkpoint cannot be used.
    """
    remarks = check_checkpoint(config.backbone) if tried is None else tried.warnings
    yield from (f"warning: {remark}" for remark in remarks)
    unchecked = tried is None and config.backbone.checkpoint is None
    if unchecked and not check_weights(config.backbone.name, download=False):
        yield f"{'':<14} its weights are not in the local cache: a run downloads them"


def _known_width(sizes: ModelSizes | None, features: Sequence[Artifact]) -> int | None:
    """Channels of the backbone: as they are known, else of features that exist, else None."""
    if sizes is not None:
        return sizes.channels
    done = next((artifact for artifact, there in zip(features, finished(features), strict=True) if there), None)
    return None if done is None else int(map_array(done.path / ROWS_FILE).shape[1])


def _describe_jobs(config: Config, num_sets: int) -> str:
    per_job, ranks = config.adapt.sets_per_job, ranks_of(config.resources, known_workers(config.resources))
    if per_job == "auto":
        sets, jobs = pluralize(num_sets, "set"), f"jobs of {pluralize(ranks, 'rank')}"
        return f"{sets} in {jobs}, as many to a job as measured rates say"
    packed = f"{pluralize(num_sets, 'set')} in " if per_job > 1 else ""
    return f"{packed}{pluralize(-(-num_sets // per_job), 'job')} of {pluralize(ranks, 'rank')}"


def _describe_adapt(config: Config, num_sets: int, sizes: ModelSizes | None) -> Iterator[str]:
    """How jobs are placed, if the number of workers is known; the memory of a step, if the backbone's sizes are.

    Raises:
        ValueError: a job has more ranks than there are workers.
    """
    per_job, workers = config.adapt.sets_per_job, known_workers(config.resources)
    ranks = ranks_of(config.resources, workers)
    if workers is not None:
        check_capacity(workers, ranks)
    if workers is not None and per_job != "auto":
        yield f"on {pluralize(workers, 'worker')}: {describe_placement(-(-num_sets // per_job), workers, ranks)}"
    if sizes is not None:
        if per_job == "auto":
            of_one = _describe_memory(config, sizes, 1, ranks)
            yield f"{of_one}; counted for one set, of which auto may put several in a job"
        else:
            yield _describe_memory(config, sizes, min(per_job, num_sets), ranks)


def _describe_memory(config: Config, sizes: ModelSizes, num_sets: int, ranks: int) -> str:
    """Activations of an image in a step, counted on a model as for the automatic batch size."""
    adapt = config.adapt
    recomputes = adapt.activation_checkpointing
    each, other = (sizes.image_bytes(recompute=recompute) for recompute in (recomputes, not recomputes))
    share = rank_share(adapt.global_batch, ranks, config.data.streams)
    at_once, fewer = share, "; adapt.micro_batch=auto takes fewer at a time where that does not fit"
    if adapt.micro_batch != "auto":
        on_gpu = may_have_gpus(config.resources)
        at_once, fewer = micro_batch_size(adapt.micro_batch, share, num_sets, on_gpu=on_gpu), ""
    total = each * at_once * num_sets / 2**30
    whole = f"all tokens ({sizes.whole_because})" if sizes.whole_because else "the class token alone"
    return (
        f"activations in float32, those of a layer at work among them: {each / 2**20:.1f} MiB an image and set "
        f"({other / 2**20:.1f} with{'out' * recomputes} adapt.activation_checkpointing), {total:.1f} GiB a rank for "
        f"{pluralize(at_once, 'image')} and {pluralize(num_sets, 'set')} (adapt.micro_batch lowers it)"
        f"{fewer}; the last block computes {whole}"
    )


def _supervised_stages(
    config: Config, flow: Flow | None, ks: tuple[int, ...], steps: int
) -> Iterable[tuple[str, str, list[Artifact]]]:
    """The stages that use the labels of the training images; how many there are is not known before they are read."""
    supervision, where = flow.supervision if flow else None, config.resources
    jobs = {
        SUPERVISED_SET: (config.adapt.supervised, pluralize(ranks_of(where, known_workers(where)), "rank")),
        SUPERVISED: (SUPERVISED in config.fuse.variants and len(ks) > 1, "all ranks"),
    }
    if any(asked for asked, _ in jobs.values()):
        yield (
            "true_labels",
            "labels of the training images, read before anything else; one task",
            [supervision.ground_truth, supervision.classes] if supervision else [],
        )
    for name, (asked, ranks) in jobs.items():
        if asked:
            what = f"with labels of the training images: one job on {ranks}, at most {pluralize(steps, 'step')}"
            yield (
                name,
                f"{what} of {config.adapt.global_batch} images",
                [supervision.trained[name]] if supervision else [],
            )


def _describe_fuse(config: Config, ks: tuple[int, ...], num_rows: int) -> str:
    trained, unfused = on_pairs(config, len(ks)), describe_unfused(config.fuse, len(ks))
    if not trained:
        return unfused or "nothing to train: none of fuse.variants learns from pairs"
    steps = pluralize(config.fuse.epochs * steps_per_epoch(num_rows, config.fuse.global_batch), "step")
    what = f"{', '.join(trained)}; one job each on all workers, {steps} of {config.fuse.global_batch} pairs"
    if any(Variant.parse(name).pairs == "neighbours" for name in trained):
        what += f", {graph_kind(config.fuse, num_rows)} k-NN graph"
    return f"{what}; {unfused}" if unfused else what


def _reuse(artifacts: list[Artifact]) -> str:
    if not artifacts:
        return "to be made"
    done = sum(finished(artifacts))
    return "all reused" if done == len(artifacts) else f"{done} of {len(artifacts)} reused"


def _costs(config: Config, num_rows: int, ks: tuple[int, ...], dim: int) -> Iterable[str]:
    """Rough sizes of arrays and of the memory of a rank."""
    widths = [dim, *config.fuse.projector]
    projector = sum(a * b for a, b in pairwise(widths))
    slices = centroid_slices(config, max(ks), num_rows, dim)
    sliced = f", centroids in {slices} slices" if slices > 1 else ""
    yield (
        f"rough bytes    (at {dim} channels) features {format_bytes(4 * dim * num_rows)}, "
        f"labels {format_bytes(4 * len(ks) * num_rows)}, "
        f"k-NN graph {format_bytes(8 * config.fuse.neighbours * num_rows)} an epoch; "
        f"per rank: projector, gradients and momentum {format_bytes(projector_bytes(projector))}, "
        f"correlation matrix {format_bytes(4 * config.fuse.projector[-1] ** 2)}; "
        f"per worker: k-means of K = {max(ks)} {format_bytes(centroid_bytes(config, max(ks), num_rows, dim))}{sliced}"
    )
    if on_pairs(config, len(ks)):
        yield _fuse_traffic(config, projector)


def _fuse_traffic(config: Config, projector: int) -> str:
    """Bytes that a step of a fusion sends, on the known number of ranks, else on two."""
    batch, width = config.fuse.global_batch, config.fuse.projector[-1]
    ranks = max(2, known_workers(config.resources) or 2)
    by_row = rows_are_cheaper(batch, width, ranks)
    cost = by_rows_cost(batch, width, ranks) if by_row else whole_cost(batch, width, ranks)
    gradients = 2 * (ranks - 1) / ranks * projector
    of_matrix = "pairs for rows of the correlation matrix and their gradients" if by_row else "the correlation matrix"
    return (
        f"fuse traffic   on {ranks} ranks a step sends and receives about "
        f"{format_bytes(4 * (gradients + cost.sent))} each: the projector's gradients {format_bytes(4 * gradients)}, "
        f"{of_matrix} {format_bytes(4 * cost.sent)}; for that matrix, "
        f"{'cut up by rows' if by_row else 'whole on every rank'}, a rank holds {format_bytes(4 * cost.held)}"
    )


def _classifiers(config: Config, ks: Sequence[int], dim: int) -> str:
    """Memory and arithmetic per rank of the largest classifiers that a job may have."""
    ranks, adapt = ranks_of(config.resources, known_workers(config.resources)), config.adapt
    of_a_job = sorted(ks, reverse=True)[: 1 if adapt.sets_per_job == "auto" else adapt.sets_per_job]
    rows = sum(-(-num_labels // ranks) for num_labels in of_a_job)
    taking_part = rows * adapt.sampled_classes
    flops = CLASSIFIER_PRODUCTS * 2 * adapt.global_batch * taking_part * dim
    sampled = f"; {adapt.sampled_classes:.0%} of them in a step" if adapt.sampled_classes < 1 else ""
    time = "" if may_have_gpus(config.resources) else f", {format_number(flops / CORE_FLOPS, 2)} s of a CPU core"
    step = f"a step {format_number(flops / 1e9)} GFLOP a rank{time}"
    return (
        f"classifier     (at {dim} channels) of K = {', '.join(map(str, of_a_job))}: {rows} classes a rank{sampled}; "
        f"rows and Adam {format_bytes(4 * (3 * dim + 1) * rows)} a rank, {step}"
    )
