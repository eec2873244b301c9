"""The whole flow: images -> features -> N partitions -> N adaptor sets -> their fusion -> scores, report, model.

`lay_out` names every artefact of a run before any of them exists; `run` makes the missing ones; `grappa_dist/plan.py`
says what would be made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from grappa_dist.artifacts import Artifact, RowArrays, Store
from grappa_dist.config import UNTRAINED, Config
from grappa_dist.data.shards import ImageShards
from grappa_dist.dist.cluster import Cluster
from grappa_dist.dist.jobs import Runner
from grappa_dist.dist.preflight import Checks, table
from grappa_dist.export import export_model
from grappa_dist.observe import Console, Events
from grappa_dist.report.content import ScoreRow
from grappa_dist.stages.adapt import adapt, adaptors_of
from grappa_dist.stages.collect import collection_of, draw_collection, has_drawn, open_images, read_a_little
from grappa_dist.stages.embed import bad_rows, embed, feature_rows, features_of
from grappa_dist.stages.evaluate import Evaluation, evaluate, insight_of, scores_of
from grappa_dist.stages.flow import Flow
from grappa_dist.stages.fuse import fuse, fusion_of, least_bytes
from grappa_dist.stages.galleries import galleries_of, weigh_galleries
from grappa_dist.stages.mirror import mirrored
from grappa_dist.stages.modelling import ModelSpec
from grappa_dist.stages.partitions import judge_partitions, partitions_of
from grappa_dist.stages.pseudo_label import label_rows, labels_of, num_labels, pseudo_label
from grappa_dist.stages.reporting import report, report_of
from grappa_dist.stages.run import Run
from grappa_dist.stages.truth import truth_of


def lay_out(config: Config, store: Store, train: ImageShards, test: ImageShards | None) -> Flow:
    """Names all artefacts; nothing is read but the images' index, and nothing is written."""
    frozen = ModelSpec("backbone", config.backbone)
    features = features_of(store, frozen, config.embed, train)
    ks = num_labels(config.clustering, len(train))
    labels = {k: labels_of(store, config.clustering, config.seed, k, features, num_rows=len(train)) for k in ks}
    adaptors = {
        k: adaptors_of(store, config.backbone, config.adapt, config.data, config.seed, labels[k]) for k in labels
    }
    sets = list(adaptors.values())
    trained = [v for v in config.fuse.variants if v not in UNTRAINED and len(sets) > 1]  # one set has nothing to weigh
    fusions: dict[str, Artifact] = {
        v: fusion_of(store, v, config.backbone, config.fuse, config.data, config.seed, sets) for v in trained
    }
    models = _models(config, adaptors, fusions)
    images = test or train
    truth = truth_of(store, images, labelled=test is not None)
    models, galleries = _with_galleries(config, store, models, truth, images)
    test_features = {m: features_of(store, spec, config.embed, images) for m, spec in models.items()}
    scores = {m: scores_of(store, truth, m, f) for m, f in test_features.items()}
    insights = {m: insight_of(store, truth, m, config.evaluate, config.seed, f) for m, f in test_features.items()}
    made_of = {**{f"scores {m}": a for m, a in scores.items()}, **{f"insight {m}": a for m, a in insights.items()}}
    partitions = partitions_of(store, config.seed, labels)
    return Flow(
        train=train,
        test=images,
        features=features,
        labels=labels,
        partitions=partitions,
        adaptors=adaptors,
        fusions=fusions,
        models=models,
        test_features=test_features,
        truth=truth,
        galleries=galleries,
        scores=scores,
        insights=insights,
        report=report_of(store, config, {**made_of, "partitions": partitions}),
        model=_exported(config, store, models[config.exported], ks),
    )


def _exported(config: Config, store: Store, spec: ModelSpec, ks: Sequence[int]) -> Artifact:
    settings = {"backbone": config.backbone.name, "sets": list(ks), "variant": spec.name}
    return store.artifact("models/" + spec.name, settings, spec.inputs)


def _models(config: Config, adaptors: Mapping[int, Artifact], fusions: Mapping[str, Artifact]) -> dict[str, ModelSpec]:
    """All models that are evaluated, in the order of the table."""
    fused = ModelSpec("", config.backbone, config.adapt.bottleneck, tuple(adaptors.values()))
    return {
        "backbone": ModelSpec("backbone", config.backbone),
        **{f"k={k}": replace(fused, name=f"k={k}", adaptors=(a,)) for k, a in adaptors.items()},
        **{v: replace(fused, name=v, fusion=fusions.get(v)) for v in config.fuse.variants},
    }


def _with_galleries(
    config: Config, store: Store, models: dict[str, ModelSpec], truth: Artifact, images: ImageShards
) -> tuple[dict[str, ModelSpec], Artifact | None]:
    """The models, where one weighs its sets by galleries, and what it weighs them by."""
    if "gallery" not in models:
        return models, None
    sets = {m: features_of(store, spec, config.embed, images) for m, spec in models.items() if m.startswith("k=")}
    galleries = galleries_of(store, config.seed, truth, sets)
    return {**models, "gallery": replace(models["gallery"], galleries=galleries)}, galleries


def run(config: Config, root: Path) -> tuple[Path, list[ScoreRow]]:
    """Makes whatever is missing; the report's folder and the rows of its table.

    Raises:
        ValueError: a setting or an input is wrong, saying which and what would be right.
        Terminated: SIGTERM came; what was running has saved its state.
    """
    store = Store(root)
    with store.lock():
        console = Console(Events(root / "events.jsonl"))
        cluster = Cluster(config.resources, tell=console.say)
        runner = Runner(cluster, config.resources, on_status=console.jobs, on_event=console.event)
        context = Run(config, store, runner, console)
        try:
            with context.runner.terminating():
                return _run(context)
        finally:
            cluster.close()


def _run(context: Run) -> tuple[Path, list[ScoreRow]]:
    config, store, console = context.config, context.store, context.console
    if not has_drawn(config.data, store):
        with console.stage("collect", f"drawing the collection {config.data.collection}"):
            draw_collection(config.data, collection_of(store, config.data))
    train, test = open_images(config.data, store, config.resources)
    flow = lay_out(config, store, train, test)
    context.runner.require(checks_of(config, store, flow))
    with mirrored(config.mirror, flow, console):
        _announce(console, flow)
        return _make(context, flow)


def checks_of(config: Config, store: Store, flow: Flow) -> Checks:
    """What the nodes are asked before the first stage that needs workers; a run that reuses everything asks none."""
    trained = [artifact for artifact in flow.fusions.values() if not artifact.complete]
    need = least_bytes(config.fuse) if trained else 0
    return Checks(store.root.absolute(), partial(read_a_little, flow.train, flow.test), need)


def check(config: Config, root: Path) -> str:
    """Starts the workers, looks whether every node can take part, and ends them; a line per node.

    Raises:
        ValueError: something is missing, saying what and where.
    """
    store = Store(root)
    cluster = Cluster(config.resources, Checks(root.absolute(), _nothing))
    if has_drawn(config.data, store):
        train, test = open_images(config.data, store, config.resources, write_index=False)
        cluster.checks = checks_of(config, store, lay_out(config, store, train, test))
    try:
        count = len(cluster.workers())
        return f"{table(cluster.facts.values())}\n{count} workers can start"
    finally:
        cluster.close()


def _nothing() -> None:
    """There is no data to read before a collection is drawn."""


def _make(context: Run, flow: Flow) -> tuple[Path, list[ScoreRow]]:
    config, store, console, train = context.config, context.store, context.console, flow.train
    embed(context, train, flow.models["backbone"], flow.features)
    bad = bad_rows(train, flow.features)
    pseudo_label(context, flow.labels, feature_rows(train, flow.features), train, bad)
    labels = {k: label_rows(artifact, train) for k, artifact in flow.labels.items()}
    judge_partitions(context, flow.partitions, labels)
    adapt(context, flow.adaptors, flow.labels, train, bad)
    fuse(context, flow.fusions, list(flow.adaptors.values()), labels, train, bad)

    features = {m: feature_rows(flow.test, f) for m, f in flow.test_features.items()}
    for name in sorted(flow.models, key=lambda name: flow.models[name].galleries is not None):  # these see the others'
        if flow.models[name].galleries is not None:
            _weigh(context, flow, features)
        embed(context, flow.test, flow.models[name], flow.test_features[name])
    bad = bad_rows(flow.test, flow.test_features["backbone"])
    evaluate(context, flow.test, bad, flow.models, Evaluation(flow.truth, features, flow.scores, flow.insights))
    if not flow.model.complete:
        with console.stage("export", config.exported):
            export_model(flow.models[config.exported], [f"k={k}" for k in flow.adaptors], flow.model)
    store.publish("model", flow.model)
    return report(context, flow)


def _weigh(context: Run, flow: Flow, features: Mapping[str, RowArrays]) -> None:
    """Weighs the adaptor sets for each task's gallery."""
    assert flow.galleries is not None
    sets = {f"k={k}": features[f"k={k}"] for k in flow.adaptors}
    bad = bad_rows(flow.test, flow.test_features["backbone"])
    weigh_galleries(context, flow.test, flow.truth, sets, bad, flow.galleries)


def _announce(console: Console, flow: Flow) -> None:
    groups = (flow.labels, flow.adaptors, flow.fusions, flow.scores)
    made = [*flow.features, *(artifact for group in groups for artifact in group.values())]
    reused = sum(artifact.complete for artifact in made)
    console.say(
        f"{len(flow.train)} training and {len(flow.test)} test images; K = {', '.join(map(str, flow.labels))}; "
        f"{reused} of {len(made)} artefacts are there and reused"
    )
