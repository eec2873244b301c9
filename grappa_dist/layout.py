"""The names of all artefacts of a run, before any of them exists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from grappa_dist.artifacts import Artifact, Store, numbered
from grappa_dist.config import AUTO, Config
from grappa_dist.data.open_images import generated_artifacts
from grappa_dist.data.shards import ImageShards
from grappa_dist.models.spec import ModelSpec
from grappa_dist.report.collect import report_of
from grappa_dist.stages.adapt import adaptors_of
from grappa_dist.stages.damages import damages_among
from grappa_dist.stages.embed import features_of, held_against
from grappa_dist.stages.evaluate import insight_of, scores_of
from grappa_dist.stages.exclude import excluding, exclusion_of
from grappa_dist.stages.flow import Exclusion, Flow, Supervision, artifacts_of
from grappa_dist.stages.fuse import fusion_of
from grappa_dist.stages.gallery_weights import galleries_of
from grappa_dist.stages.ground_truth import ground_truth_of
from grappa_dist.stages.knn_graph import graph_kind
from grappa_dist.stages.partitions import partitions_of
from grappa_dist.stages.precision import settled
from grappa_dist.stages.pseudo_label import labels_of, num_labels
from grappa_dist.stages.supervised import supervised_fusion_of, true_labels_of
from grappa_dist.variants import BACKBONE, SUPERVISED, SUPERVISED_SET, Variant, split_strength
from grappa_dist.verdict import RULE, candidates


def lay_out(config: Config, store: Store, train: ImageShards, test: ImageShards | None) -> Flow:
    """Names all artefacts, in the precision of the run directory. Reads the index of the images, which features are
    there and what was damaged before, and writes nothing."""
    return _named(settled(config, store, train), store, train, test)


def _named(config: Config, store: Store, train: ImageShards, test: ImageShards | None) -> Flow:
    features = features_of(store, ModelSpec(BACKBONE, config.backbone), config.embed, train)
    images = test or train.some(config.evaluate.train_images, config.seed)
    excluded = exclusion_of(store, config.data, train, images, has_test=test is not None)
    labels = _labels(config, store, train, features, excluded)
    settings = (config.backbone, config.adapt, config.data, config.seed)
    adaptors = {k: adaptors_of(store, *settings, artifact) for k, artifact in labels.items()}
    sets = list(adaptors.values())
    supervision = _supervision(config, store, train, features, sets, excluded=excluded)
    rows = {**numbered("shard", features), **excluding(excluded.train)}
    fusions = _fusions(config, store, len(train), rows, sets, supervision)
    models = _models(config, adaptors, fusions, supervision)
    ground_truth = ground_truth_of(store, images, labelled=test is not None, data=config.data)
    models, galleries = _with_galleries(config, store, models, ground_truth, images, excluded=excluded)
    test_features = {m: features_of(store, spec, config.embed, images) for m, spec in models.items()}
    how, out = (config.evaluate, config.seed), excluded.test
    scores = {m: scores_of(store, ground_truth, m, f, excluded=out) for m, f in test_features.items()}
    insights = {m: insight_of(store, ground_truth, m, *how, f, excluded=out) for m, f in test_features.items()}
    partitions = partitions_of(store, config.seed, labels)
    flow = Flow(
        train=held_against(train, features),
        test=held_against(images, test_features[BACKBONE]),
        supervision=supervision,
        features=features,
        labels=labels,
        partitions=partitions,
        adaptors=adaptors,
        fusions=fusions,
        models=models,
        test_features=test_features,
        ground_truth=ground_truth,
        galleries=galleries,
        scores=scores,
        insights=insights,
        excluded=excluded,
        report=report_of(store, config, _shown(scores, insights, partitions)),
        model=_exported(config, store, models, scores if test is not None else {}),
    )
    return _with_damages(flow, config, store)


def _labels(
    config: Config, store: Store, train: ImageShards, features: Sequence[Artifact], excluded: Exclusion
) -> dict[int, Artifact]:
    settings, seed, count = config.clustering, config.seed, len(train)
    return {
        k: labels_of(store, settings, seed, k, features, num_rows=count, excluded=excluded.train)
        for k in num_labels(settings, count)
    }


def _shown(
    scores: Mapping[str, Artifact], insights: Mapping[str, Artifact], partitions: Artifact
) -> dict[str, Artifact]:
    """What the report is made of."""
    of_models = {f"scores {m}": a for m, a in scores.items()} | {f"insight {m}": a for m, a in insights.items()}
    return of_models | {"partitions": partitions}


def _with_damages(flow: Flow, config: Config, store: Store) -> Flow:
    """The flow with a report of what was damaged and made anew, which has a name of its own."""
    artifacts = (*generated_artifacts(store, config.data), *artifacts_of(flow))
    damages = tuple(damages_among(store.root, (artifact.name for artifact in artifacts)))
    if not damages:
        return flow
    shown = _shown(flow.scores, flow.insights, flow.partitions)
    return replace(flow, damages=damages, report=report_of(store, config, shown, damages))


def _exported(
    config: Config, store: Store, models: Mapping[str, ModelSpec], scores: Mapping[str, Artifact]
) -> Artifact:
    """The exported model: named by what it is made of or, where scores choose it, by these.

    Args:
        scores: of test images, which may turn out to have no labels; {} without test images.

    Raises:
        ValueError: `evaluate.export` names a set that the run does not have.
    """
    if config.evaluate.export == AUTO and scores:
        possible = candidates(models)
        settings = {"backbone": config.backbone.name, "candidates": possible, "else": config.exported, "rule": RULE}
        inputs = {f"scores {m}": scores[m] for m in dict.fromkeys([*possible, config.exported])}
        return store.artifact("models/auto", settings, inputs)
    if config.exported not in models:
        names = ", ".join(name for name in models if name.startswith("k="))
        raise ValueError(f"evaluate.export={config.exported!r}: the run has the sets {names}")
    spec = models[config.exported]
    ks = [int(name.removeprefix("k=")) for name in models if name.startswith("k=")]
    sets = spec.sets if spec.random_sets else ks
    settings = {"backbone": config.backbone.name, "sets": sets, "variant": spec.name}
    if config.backbone.computes_in != "fp32":  # the backbone alone has no inputs that say so
        settings["precision"] = config.backbone.computes_in
    return store.artifact("models/" + spec.name, settings, spec.inputs)


def on_pairs(config: Config, num_sets: int) -> list[str]:
    """The variants that are trained on pairs of images. With a single partition only randomly initialised sets are."""
    variants = map(Variant.parse, config.fuse.variants)
    return [v.name for v in variants if v.pairs and (num_sets > 1 or v.start != "adapted")]


def _fusions(
    config: Config,
    store: Store,
    num_rows: int,
    rows: Mapping[str, Artifact],
    sets: Sequence[Artifact],
    supervision: Supervision | None,
) -> dict[str, Artifact]:
    """The artefacts of the fusions that are trained, by variant.

    Args:
        rows: features of the images, and which take no part, for fusions that depend on no adaptor set.
    """
    fusions: dict[str, Artifact] = {}
    settled = config.fuse.model_copy(update={"graph": graph_kind(config.fuse, num_rows)})
    for name in on_pairs(config, len(sets)):
        same = (store, name, config.backbone, settled, config.data, config.seed)
        random_sets = Variant.parse(name).num_random_sets(len(sets))
        if random_sets:
            of_sets = {"bottleneck": config.adapt.bottleneck, "num_sets": random_sets}
            fusions[name] = fusion_of(*same, rows, of_sets)
        else:
            fusions[name] = fusion_of(*same, numbered("adaptors", sets))
    if supervision is not None and supervision.fusion is not None:
        fusions[SUPERVISED] = supervision.fusion
    return fusions


def _supervision(
    config: Config,
    store: Store,
    train: ImageShards,
    features: Sequence[Artifact],
    sets: Sequence[Artifact],
    *,
    excluded: Exclusion,
) -> Supervision | None:
    fused = SUPERVISED in config.fuse.variants and len(sets) > 1
    if not config.adapt.supervised and not fused:
        return None
    ground_truth = ground_truth_of(store, train, labelled=True, data=config.data)
    classes = true_labels_of(store, ground_truth, features, excluded=excluded.train)
    where = (store, config.backbone, config.adapt, config.data, config.seed)
    adaptors = adaptors_of(*where, classes, name=SUPERVISED_SET) if config.adapt.supervised else None
    fusion = supervised_fusion_of(store, config, classes, sets) if fused else None
    return Supervision(ground_truth, classes, adaptors, fusion)


def _models(
    config: Config,
    adaptors: Mapping[int, Artifact],
    fusions: Mapping[str, Artifact],
    supervision: Supervision | None,
) -> dict[str, ModelSpec]:
    """All models that are evaluated, in the order of the table."""
    fused = ModelSpec("", config.backbone, config.adapt.bottleneck, tuple(adaptors.values()))
    models: dict[str, ModelSpec] = {
        BACKBONE: ModelSpec(BACKBONE, config.backbone),
        **{f"k={k}": replace(fused, name=f"k={k}", adaptors=(a,)) for k, a in adaptors.items()},
    }
    for name in config.fused:
        variant, strength = split_strength(name)
        models[name] = replace(fused, name=name, fusion=fusions.get(variant), strength=strength)
        if random_sets := Variant.parse(variant).num_random_sets(len(adaptors)):
            models[name] = replace(models[name], adaptors=(), random_sets=random_sets)
    if supervision is not None and supervision.adaptors is not None:
        models[SUPERVISED_SET] = replace(fused, name=SUPERVISED_SET, adaptors=(supervision.adaptors,))
    return models


def _with_galleries(
    config: Config,
    store: Store,
    models: dict[str, ModelSpec],
    ground_truth: Artifact,
    images: ImageShards,
    *,
    excluded: Exclusion,
) -> tuple[dict[str, ModelSpec], Artifact | None]:
    """The models, and the weights of the sets for each gallery, if a variant asks for them."""
    per_gallery = [name for name in config.fuse.variants if Variant.parse(name).per_gallery]
    if not per_gallery:
        return models, None
    sets = {m: features_of(store, spec, config.embed, images) for m, spec in models.items() if m.startswith("k=")}
    copies = config.fuse.duplicate_cosine
    galleries = galleries_of(store, config.seed, copies, ground_truth, sets, excluded=excluded.test)
    return {**models, **{name: replace(models[name], galleries=galleries) for name in per_gallery}}, galleries
