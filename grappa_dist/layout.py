"""Names every artefact of a run before any of them exists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from grappa_dist.artifacts import Artifact, Store
from grappa_dist.config import UNTRAINED, Config
from grappa_dist.data.shards import ImageShards
from grappa_dist.stages.adapt import adaptors_of
from grappa_dist.stages.embed import features_of
from grappa_dist.stages.evaluate import insight_of, scores_of
from grappa_dist.stages.flow import Flow
from grappa_dist.stages.fuse import fusion_of
from grappa_dist.stages.galleries import galleries_of
from grappa_dist.stages.modelling import ModelSpec
from grappa_dist.stages.partitions import partitions_of
from grappa_dist.stages.pseudo_label import labels_of, num_labels
from grappa_dist.stages.reporting import report_of
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
    images = test or train.some(config.evaluate.train_images, config.seed)
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
    galleries = galleries_of(store, config.seed, config.fuse.duplicate_cosine, truth, sets)
    return {**models, "gallery": replace(models["gallery"], galleries=galleries)}, galleries
