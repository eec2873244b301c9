"""The whole flow: images -> features -> N partitions -> N adaptor sets -> their fusion -> scores, report, model.

`layout.py` names every artefact of a run before any of them exists, `run` makes the missing ones, `plan.py` describes
what would be made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grappa_dist.artifacts import CONTENT_BYTES, Artifact, RowArrays, Store, finished, label_rows, look_at
from grappa_dist.bucket import bucket_of
from grappa_dist.checksums import MANIFEST
from grappa_dist.config import Config
from grappa_dist.console import Console, pluralize
from grappa_dist.data.open_images import (
    ends_of,
    generate_data_set,
    generated_artifacts,
    generated_data_set,
    generator_of,
    is_generated,
    open_images,
    read_a_little,
)
from grappa_dist.distributed.placement import known_workers
from grappa_dist.distributed.preflight import Checks, table
from grappa_dist.distributed.ray_cluster import Cluster
from grappa_dist.estimate import describe_seconds, expected
from grappa_dist.export import export_model
from grappa_dist.inputs import look
from grappa_dist.layout import lay_out
from grappa_dist.make_shards.left_out import BAD_LIST
from grappa_dist.models.backbone import check_name
from grappa_dist.models.spec import build_backbone, check_ready, note_module
from grappa_dist.models.trial import Verdict as TrialVerdict
from grappa_dist.models.trial import describe_difference, verdict_of
from grappa_dist.report import console_table
from grappa_dist.report.collect import describe_bad_images, describe_labels, list_bad_images, report
from grappa_dist.report.content import ScoreRow
from grappa_dist.report.verdict import as_json, verdict_lines, why_exported, without_labels
from grappa_dist.stages.adapt import adapt
from grappa_dist.stages.bad_rows import bad_rows
from grappa_dist.stages.damages import Mending
from grappa_dist.stages.embed import embed, embed_side_by_side, feature_rows
from grappa_dist.stages.evaluate import Evaluation, evaluate, task_queries
from grappa_dist.stages.exclude import exclude, excluded_rows, turns_of
from grappa_dist.stages.flow import Flow, artifacts_of
from grappa_dist.stages.fuse import describe_unfused, fuse, least_bytes
from grappa_dist.stages.gallery_weights import weigh_galleries
from grappa_dist.stages.partitions import partition_statistics
from grappa_dist.stages.precision import record, settle, settled
from grappa_dist.stages.pseudo_label import check_slices, pseudo_label
from grappa_dist.stages.run import Run, keeping_config, refuse_seeds, running
from grappa_dist.stages.supervised import adapt_supervised, fuse_supervised, name_classes, read_true_labels
from grappa_dist.verdict import TaskQueries, Verdict, verdict_on

NAMED = 5  # damaged files that an error names


@dataclass(frozen=True)
class Finished:
    """What a run has come to."""

    report: Path  # the folder of report.html and metrics.json
    model: Path  # the exported model
    rows: list[ScoreRow]  # of the table of scores; [] without labels
    verdict: Verdict | None  # None without labelled test images
    queries: Sequence[TaskQueries]  # of each task; [] likewise
    has_test: bool
    left_out: str  # how many images could not be used, and which file names them; "" if all could
    labels: str = ""  # why the test images give no scores; "" where they do, or there are none

    def text(self) -> str:
        """All that is printed at the end: the scores, where report and model are and, last, the verdict."""
        run = str(self.model.parent)
        if self.verdict is None:
            lines = without_labels(run, has_test=self.has_test, why=self.labels)
        else:
            lines = verdict_lines(self.verdict, run)
        table = console_table(self.rows) if self.rows else ""
        places = f"report  {self.report / 'report.html'}\nmodel   {self.model}"
        if (bucket := bucket_of(self.model)) is not None:
            places += f"\nbucket  {bucket.url}/report/report.html and {bucket.url}/model"
        return "\n".join(filter(None, [table, places, self.left_out, *lines]))

    def figures(self) -> dict[str, Any]:
        """The same for programs; the table is in metrics.json beside the report."""
        places = {"report": str(self.report / "report.html"), "model": str(self.model)}
        return {**places, "verdict": as_json(self.verdict)}


def run(config: Config, root: Path, until: str | None = None) -> Finished | None:
    """Makes whatever is missing; what the run has come to, or None where it ends after a stage.

    Args:
        until: embed, pseudo_label, adapt or fuse, to end after that stage, without a report.

    Raises:
        ValueError: a setting or an input is wrong; the message names it and what would be right.
        Terminated: after SIGTERM, SIGHUP or Ctrl-C; jobs have saved their state, unless its `waited_s` is set.
    """
    refuse_seeds(root.expanduser())
    with running(config, root) as context, keeping_config(context):
        return run_in(context, until)


def run_in(context: Run, until: str | None = None) -> Finished | None:
    """As `run`, with the settings, the storage and the workers of `context`."""
    console, data, backbone = context.console, context.config.data, context.config.backbone
    inputs = look(context.config, context.store.root, log=console.log)
    if inputs.missing:  # making shards takes long, and a wrong name or missing weights would end the run after it
        check_name(backbone.name, backbone.kwargs)
        check_ready(backbone)
        check_slices(context.config.resources)
    context = replace(context, config=inputs.make(console.log, console), given=context.config)
    mending = Mending(context)
    trained_on = not set(data.train).isdisjoint(data.test)  # as given: their shards have other names
    return mending.mended(lambda: _flow(context, mending, until, trained_on=trained_on))


def _flow(context: Run, mending: Mending, until: str | None, *, trained_on: bool) -> Finished | None:
    """Once through all stages, after a look at what is reused."""
    config, store, console = context.config, context.store, context.console
    mending.check(generated_artifacts(store, config.data))
    if not is_generated(config.data, store):
        with console.stage("load", f"generating the demo data set {config.data.collection}"):
            generate_data_set(config.data, generated_data_set(store, config.data))
    train, test = open_images(config.data, store, config.resources, log=console.log)
    config = (context := settle(context, train)).config
    flow = lay_out(config, store, train, test)
    if mending.check(artifacts_of(flow)):
        flow = lay_out(config, store, train, test)  # the report tells of it
    checks = checks_of(config, store, flow)
    if context.files is not None:
        context.files.send()  # the indexes of shards, which workers read
    if flow.needs_backbone(until):
        tried = _tried(config, store, log=console.log)
        note_module(store.root / "index", config.backbone)
        for warning in tried.warnings:
            console.log(f"warning: {warning}")
        checks = replace(checks, backbone=partial(describe_difference, config.backbone, tried.weights))
    context.runner.require(checks)
    console.log(_describe_run(flow, has_test=config.has_test))
    _log_any(console, describe_unfused(config.fuse, len(flow.labels)))
    if until is None:
        _log_any(console, _expect(context, flow))
    record(context)
    for stage in _stages(context, flow):
        if stage == until:
            _log_any(console, describe_bad_images(flow))
            console.event("ended_early", until=until)
            return None
    return _finish(context, flow, trained_on=trained_on)


def _finish(context: Run, flow: Flow, *, trained_on: bool) -> Finished:
    """Exports a model, which the scores choose where they may, and writes the report."""
    config, store, console = context.config, context.store, context.console
    tasks = task_queries(flow.ground_truth, flow.scores)
    verdict = verdict_on(tasks, flow.models, config.evaluate.export, trained_on=trained_on) if tasks else None
    exported = verdict.exported if verdict else config.exported
    if not flow.model.complete:
        with console.stage("export", exported):
            export_model(flow.models[exported], flow.model, why_exported(verdict, config.evaluate.export))
    model = store.publish("model", flow.model)
    folder, rows = report(context, flow, verdict)
    left_out = list_bad_images(flow, store.root / BAD_LIST)
    labels = "" if rows else describe_labels(flow)
    return Finished(folder, model, rows, verdict, tasks, config.has_test, left_out, labels)


def _stages(context: Run, flow: Flow) -> Iterator[str]:
    """Makes what is missing, stage by stage; yields the name of each finished stage."""
    train, labelled = flow.train, flow.supervision
    exclude(context, flow.excluded, train, flow.test)
    excluded = excluded_rows(flow.excluded.train)
    if labelled is not None:
        read_true_labels(context, train, labelled.ground_truth, labelled.classes)
    embed(context, train, flow.models["backbone"], flow.features, gone=frozenset(excluded.tolist()))
    yield "embed"

    bad = bad_rows(train, flow.features)
    turns, bad = turns_of(context.config.data, flow.excluded.train, bad), np.union1d(bad, excluded)
    pseudo_label(context, flow.labels, feature_rows(train, flow.features), train, bad)
    labels = {k: label_rows(artifact, train.starts, k) for k, artifact in flow.labels.items()}
    partition_statistics(context, flow.partitions, labels)
    yield "pseudo_label"

    adapt(context, flow.adaptors, flow.labels, train, bad, turns=turns)
    if labelled is not None:
        name_classes(context, labelled.ground_truth, feature_rows(train, flow.features), bad, labelled.classes)
        if labelled.adaptors is not None:
            adapt_supervised(context, labelled.adaptors, labelled.classes, train, turns=turns)
    yield "adapt"

    sets = list(flow.adaptors.values())
    fuse(context, flow.on_pairs, sets, labels, train, bad, turns=turns)
    if labelled is not None and labelled.fusion is not None:
        fuse_supervised(context, labelled.fusion, sets, labelled.classes, train, turns=turns)
    yield "fuse"

    features = {m: feature_rows(flow.test, f) for m, f in flow.test_features.items()}
    _embed_test_images(context, flow, features)
    bad = _no_test_rows(flow)
    evaluate(context, flow.test, bad, flow.models, Evaluation(flow.ground_truth, features, flow.scores, flow.insights))
    yield "evaluate"


def _expect(context: Run, flow: Flow) -> str:
    """Tells the console how long the stages take, if that is known; one line about it."""
    measuring = partial(context.console.stage, "measure", "this machine, to know how long the run takes")
    estimator = expected(context.config, context.store.root, flow, measuring)
    if estimator is None:
        return ""
    context.console.expect(estimator.parts())
    return ": ".join(filter(None, describe_seconds(estimator)))


def _embed_test_images(context: Run, flow: Flow, features: Mapping[str, RowArrays]) -> None:
    """One pass over the images for all models but those of galleries, which read the others' features: then theirs."""
    gone = frozenset(excluded_rows(flow.excluded.test).tolist())
    for per_gallery in (False, True):
        models = {name: spec for name, spec in flow.models.items() if (spec.galleries is not None) == per_gallery}
        if per_gallery and models:
            _weigh(context, flow, features)
        if models:
            made = {name: flow.test_features[name] for name in models}
            embed_side_by_side(context, flow.test, models, made, gone=gone)


def _weigh(context: Run, flow: Flow, features: Mapping[str, RowArrays]) -> None:
    """Weights of the adaptor sets for each task's gallery."""
    assert flow.galleries is not None
    sets = {f"k={k}": features[f"k={k}"] for k in flow.adaptors}
    weigh_galleries(context, flow.test, flow.ground_truth, sets, _no_test_rows(flow), flow.galleries)


def _no_test_rows(flow: Flow) -> NDArray[np.int64]:
    """Of the images that are evaluated, those that do not decode or are excluded, ascending."""
    return np.union1d(bad_rows(flow.test, flow.test_features["backbone"]), excluded_rows(flow.excluded.test))


def _log_any(console: Console, text: str) -> None:
    """Logs the text unless it is empty."""
    if text:
        console.log(text)


def _describe_run(flow: Flow, *, has_test: bool) -> str:
    """One line: how many images, which K, and how many artefacts are reused."""
    groups = (flow.labels, flow.adaptors, flow.fusions, flow.scores)
    made = [*flow.features, *(artifact for group in groups for artifact in group.values())]
    if flow.supervision is not None and flow.supervision.adaptors is not None:
        made.append(flow.supervision.adaptors)
    reused = sum(finished(made))
    tested = f"and {pluralize(len(flow.test), 'test image')}"
    if not has_test:
        tested = f"and no test set: {len(flow.test)} of them are looked at in its place"
    return (
        f"{pluralize(len(flow.train), 'training image')} {tested}; K = {', '.join(map(str, flow.labels))}; "
        f"{reused} of {pluralize(len(made), 'artefact')} are there and reused"
    )


def checks_of(config: Config, store: Store, flow: Flow) -> Checks:
    """What every node must pass before the first stage that needs workers.

    Raises:
        ValueError: more slices of the centroids are asked for than there can be ranks.
    """
    check_slices(config.resources, flow.labels.values(), len(flow.train.shards))
    fuses = not all(artifact.complete for artifact in flow.on_pairs.values())
    need = least_bytes(config.fuse, known_workers(config.resources)) if fuses else 0
    read, bf16 = partial(read_a_little, ends_of(flow.train, flow.test)), config.backbone.computes_in == "bf16"
    return Checks(store.root.absolute(), read, need, bf16=bf16)


def _tried(config: Config, store: Store, *, log: Callable[[str], None] | None = None) -> TrialVerdict:
    """The verdict on a backbone that is still needed; without `log`, as nothing is made, none is kept."""
    check_ready(config.backbone)
    index = store.root / "index"
    return verdict_of(config.backbone, index, log=log) if log else verdict_of(config.backbone, index, keep=False)


def check(config: Config, root: Path, *, deep: bool = False) -> str:
    """Checks the artefacts of the run, and starts the workers to see whether every node can take part.

    Writes nothing where all artefacts are there; else a file that is removed again, to see that all nodes can.

    Args:
        deep: whether all bytes of all artefacts are read, or only the smallest files up to CONTENT_BYTES.

    Returns:
        A line per node, and one that counts workers and artefacts.

    Raises:
        ValueError: artefacts are damaged, with their files; a node cannot take part; the backbone cannot be built; its
            weights are not available and still needed.
    """
    _check_settings(config, Store(root))
    store, whole, finished = Store(root), "0 artefacts there and whole", False
    cluster = Cluster(config.resources, Checks(root.absolute(), _nothing))
    config = (inputs := look(config, root)).config
    if is_generated(config.data, store) and not inputs.missing:
        made = generated_artifacts(store, config.data)
        _check_artifacts(made, deep=deep)  # what follows reads it
        train, test = open_images(config.data, store, config.resources, write_index=False)
        flow = lay_out(config := settled(config, store, train), store, train, test)
        made += artifacts_of(flow)
        whole = _check_artifacts(made, deep=deep) + (_check_images(flow) if deep else "")
        finished = not flow.needs_backbone()
        cluster.checks = replace(checks_of(config, store, flow), writes=not all(a.complete for a in made))
    warnings: tuple[str, ...] = ()
    if not finished:
        tried = _tried(config, store)
        warnings = tuple(f"warning: {warning}\n" for warning in tried.warnings)
        assert cluster.checks is not None
        compare = partial(describe_difference, config.backbone, tried.weights)
        cluster.checks = replace(cluster.checks, backbone=compare)
    try:
        count = len(cluster.workers())
        return f"{''.join(warnings)}{table(cluster.facts.values())}\n{pluralize(count, 'worker')} can start; {whole}"
    finally:
        cluster.close()


def _check_settings(config: Config, store: Store) -> None:
    """Raises what a run would, where what the settings name cannot be built, called or read."""
    build_backbone(config.backbone, pretrained=False)
    if not is_generated(config.data, store):
        generator_of(config.data)
        check_slices(config.resources)


def _check_images(flow: Flow) -> str:
    """How many images are as they were embedded; raises a ValueError that names one that is not."""
    return f"; {pluralize(flow.train.check_images() + flow.test.check_images(), 'image')} as embedded"


def _check_artifacts(artifacts: Sequence[Artifact], *, deep: bool) -> str:
    """How many are whole; raises a ValueError that names those that are not."""
    made = [artifact for artifact, there in zip(artifacts, finished(artifacts), strict=True) if there]
    look = look_at(made, None if deep else CONTENT_BYTES)
    wrong = [f"{d.path} {d.why}" for d in look.damages]
    wrong += [f"{artifact.path / MANIFEST} is missing" for artifact in made if not artifact.complete]
    if wrong:
        more = f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise ValueError(
            f"{pluralize(len(wrong), 'damaged artefact')}: {'; '.join(wrong[:NAMED])}{more}. "
            "A run sets them aside and makes them anew"
        )
    whole = f"{pluralize(len(made), 'artefact')} there and whole"
    if look.num_bytes < look.all_bytes and not deep:
        whole += f", by all sizes and the content of {look.num_bytes:,} of {look.all_bytes:,} bytes (--deep reads all)"
    if old := len(look.without_checksums):
        whole += f"; {old} of them by size alone, made before there were checksums"
    return whole


def _nothing() -> None:
    """Reads no data: there is none before the demo data set is generated."""
