"""Every setting, read from a YAML file and `key=value` overrides (defaults < YAML < overrides) and checked at once.

Unknown keys are refused. Errors name the key, the value found and what would be right. Units are in the names. `out`
and `resources` do not change the result: they enter the fingerprint of no artefact but the report, which shows them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from grappa_dist.output import has_secret, is_secret_name, suggestion, without_secrets
from grappa_dist.variants import BACKBONE, MOST_STRENGTH, SUPERVISED_SET, VARIANTS, Variant, VariantName, at_strength
from grappa_dist.yaml_text import describe, parse

MOST_BYTES = 2**20  # of a config
_PATH_SETTINGS = (
    ("", "out"),
    ("data", "train", "test", "shards_dir", "exclude"),
    ("backbone", "checkpoint"),
    ("resources", "cache_dir", "copies_dir"),
)
CONFIG_FILE = "config.yaml"  # of a run, in its directory: the settings of the latest that was not refused
_VARIABLE = re.compile(r"\$(?:\$|([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


def expanded(path: str, option: str) -> str:
    """A path as it is meant: `~` is a home folder, `$NAME` and `${NAME}` are variables, `$$` is a dollar sign.

    Args:
        option: where it was given, for the message.

    Raises:
        ValueError: there is no such user, or the variable is not set or empty.
    """
    try:
        return _expanded(path)
    except ValueError as error:
        raise ValueError(f"{option} {path}: {error}") from None


def _expanded(path: str) -> str:
    def value(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        name = found[1] or found[2]
        if not os.environ.get(name):
            raise ValueError(f"the variable {name} is not set; a dollar sign in a name is written as $$")
        return os.environ[name]

    home = os.path.expanduser(path)
    if home.startswith("~"):
        raise ValueError(f"there is no user {home.partition('/')[0][1:]!r}; a folder of that name is ./{path}")
    return _VARIABLE.sub(value, home)


def absolute_path(path: str) -> str:
    """The same place for any working directory; addresses of stores are left as they are."""
    return path if "://" in path else os.path.abspath(path)


def _as_path(value: str) -> str:
    try:
        return _expanded(value)
    except ValueError as error:
        raise PydanticCustomError("path", "{why}", {"why": str(error)}) from None


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str | int) else value


PathText = Annotated[str, AfterValidator(_as_path)]
Paths = Annotated[tuple[PathText, ...], BeforeValidator(_as_tuple)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Modulepath = Annotated[str, Field(pattern=r"^[\w.]+:[\w./-]+$")]
Rgb = tuple[float, float, float]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class DataConfig(Section):
    """Where the images are: folders of images or of WebDataset tars, or a function that generates a data set."""

    train: Paths = ()  # the images to adapt to; labels are read only for rows that use them
    test: Paths = ()  # images to evaluate on; labels optional; empty: label-free figures on the training images
    collection: Modulepath | None = None  # `module:function` that yields images, instead of train and test
    collection_kwargs: dict[str, Any] = {}  # its arguments
    split: Literal["auto", "none", "classes"] = "auto"  # auto: by folders train/ and test/; classes: half of them test
    shards_dir: PathText | None = None  # gets the shards that are made of images; null: `shards/` in the run directory
    label_field: str | None = None  # column of a table or list, or key of JSON members, with the label; null: `label`
    label_member: Literal["json", "txt", "cls"] = "json"  # of a tar: which file beside an image has its label
    max_bad_share: Fraction = 0.01  # more undecodable rows than this stop the run
    exclude: Paths = ()  # CSVs of images that take no part, as `grappa-dist duplicates` writes them
    duplicates: Literal["drop", "weigh"] = "drop"  # that these drop; weigh: a group counts as one, shown in turn
    streams: Count = 128  # V: an epoch is cut into this many sequential streams (part of the result, ranks are not)
    shuffle_window: Count = 1024  # rows of a stream that are shuffled together

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if self.duplicates == "weigh" and not self.exclude:
            raise ValueError("data.duplicates=weigh: is about groups that a list has; expected data.exclude with it")
        if bool(self.train) == bool(self.collection):
            raise ValueError(
                "give either data.train (folders of images or of shards) or data.collection, "
                f"got data.train={list(self.train)} and data.collection={self.collection!r}"
            )
        return self


class BackboneConfig(Section):
    """The frozen ViT. Pixel settings that are null come from timm's data config, else they are ImageNet's."""

    name: Modulepath  # `timm:<model>` or `<module>:<function>`
    kwargs: dict[str, Any] = {}  # arguments of the model or function
    checkpoint: PathText | None = None  # a safetensors or weights-only file, instead of timm's download
    image_size: Count | None = None  # side of what the model sees, in pixels; null: timm's, else 224
    resize: Literal["crop", "squash"] | None = None  # test images: null, crop: shorter side, then centre crop
    interpolation: Literal["bicubic", "bilinear", "lanczos"] | None = None  # null: timm's, else bicubic
    mean: Rgb | None = None  # of RGB in [0, 1], subtracted inside the model; null: timm's, else ImageNet's
    std: Rgb | None = None  # divided by, likewise
    pool: Literal["token", "avg", "map"] | None = None  # of tokens to a feature; null: timm's. docs/backbones.md
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of all that runs through it; auto: bf16 on GPUs, else fp32

    @property
    def computes_in(self) -> Literal["fp32", "bf16"]:
        """The precision; `auto` is fp32, on any device, until a run settles it (stages/precision.py)."""
        return "bf16" if self.precision == "bf16" else "fp32"

    @pydantic.model_serializer(mode="wrap")
    def _left_out_by_default(self, settings: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        """`pool` and `precision` are there only if they are given, as artefacts were named before there were any."""
        found, default = settings(self), {"pool": None, "precision": "auto"}
        return {key: value for key, value in found.items() if (key, value) not in default.items()}


class EmbedConfig(Section):
    batch_size: Count = 128  # part of the result: a GEMM's last bits depend on its shape, so batches are padded to it


class ClusteringConfig(Section):
    """Pseudo-labels: k-means with N numbers of clusters."""

    num_labels: tuple[Count, ...] | Literal["auto"] = "auto"  # K_1..K_N; auto: powers of two up to n or 2^17
    iterations: Count = 20  # updates of the centroids at most; fewer when they no longer move
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0  # stop when inertia falls by less than this fraction; 0: never
    spherical: bool = False  # re-normalise means (ours; the paper's k-means does not)
    init: Literal["auto", "k-means++", "k-means||"] = "auto"  # first centroids; auto: by K and n
    method: Literal["auto", "exact", "sampled", "hierarchical", "approximate"] = "auto"  # auto: by cost, and reported
    assignment: Literal["auto", "exact", "approximate"] = "auto"  # of the final labels where the method is not exact
    sample_rows_per_cluster: Count = 64  # of `sampled`: centroids are fitted to K times as many rows
    probes: Count = 8  # inverted lists of centroids that a row is compared with where it is not compared with all
    balance: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None  # largest cluster, in mean sizes n / K
    restarts: Count = 1  # with other seeds; the lowest inertia is kept

    @model_validator(mode="after")
    def _distinct(self) -> ClusteringConfig:
        if self.num_labels != "auto" and (len(set(self.num_labels)) < len(self.num_labels) or not self.num_labels):
            raise ValueError(f"clustering.num_labels must be distinct and not empty, got {list(self.num_labels)}")
        return self


class AdaptConfig(Section):
    """Training of one adaptor set. Defaults: lr, weight decay and loss from the paper, the rest ours."""

    bottleneck: Count = 64  # H, width of an adaptor
    gamma: Rate = 16.0  # scale of the norm-softmax, Eq. (2)
    global_batch: Count = 128  # images of a step over all ranks, at most: the batches of an epoch have even sizes
    epochs: Count = 3  # passes over the training images
    learning_rate: Rate = 1e-3  # peak of Adam's rate; half a cosine takes it to 0
    weight_decay: Rate = 1e-3  # L2 added to the gradient (Adam, not AdamW)
    warmup_steps: Annotated[int, Field(ge=0)] = 0  # of a linear climb to the peak
    classifier: Literal["centroids", "random"] = "centroids"  # where the throw-away classifier starts
    sampled_classes: PositiveFraction = 1.0  # fraction of the classes in the softmax of a step; 1: all
    min_crop_area: PositiveFraction = 0.25  # smallest fraction of the image in a random crop
    clip_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None  # of the gradient of a set's adaptors
    checkpoint_steps: Count = 50  # steps between checkpoints
    sets_per_job: Count | Literal["auto"] = 1  # trained together, on images decoded once; auto: by measured rates
    micro_batch: Count | Literal["auto"] | None = None  # images at a time per rank; null: its batch; auto: by memory
    activation_checkpointing: bool = False  # less memory for a second forward pass
    zero_stage: int = 0  # of DeepSpeed: 1 partitions the adaptors' optimizer state over the ranks, 2 gradients too
    supervised: bool = False  # also trains a set on the labels of the training images, as a baseline

    def of_result(self) -> dict[str, Any]:
        """The settings that decide the trained set; `clip_norm` and `sampled_classes` only if not at their default."""
        where = {"checkpoint_steps", "sets_per_job", "micro_batch", "activation_checkpointing", "zero_stage"}
        left_out_by_default = {"clip_norm": None, "sampled_classes": 1.0}
        settings = self.model_dump(mode="json", exclude={*where, "supervised"})
        return {k: v for k, v in settings.items() if (k, v) not in left_out_by_default.items()}

    @model_validator(mode="after")
    def _zero_stage(self) -> AdaptConfig:
        if self.zero_stage not in (0, 1, 2):
            raise ValueError(
                f"adapt.zero_stage={self.zero_stage}: must be 0, 1 or 2; stage 3 would cut up the frozen backbone as "
                "well and gather it again for every layer of every step, to save memory that adaptors hardly take"
            )
        return self


AUTO = "auto"  # of evaluate.export


class FuseConfig(Section):
    """The fusion: its variants, and the training of those that learn from pairs of images."""

    variants: tuple[VariantName, ...] = ("average", "transforms", "neighbours")  # how sets become one model
    global_batch: Annotated[int, Field(ge=2)] = 256  # pairs of a step over all ranks, at most
    micro_batch: Count | Literal["auto"] = 64  # images at a time per rank, of one loss for all; auto: by memory
    epochs: Count = 1  # passes over the training images
    projector: tuple[Count, ...] = (8192, 8192, 8192)  # widths of its layers; thrown away after training
    beta: Rate = 0.0051  # off-diagonal weight, Eq. (4)
    loss_scale: Rate = 0.024  # factor of the loss; one reading of "scaling"
    neighbours: Count = 5  # k of the k-NN graph
    refresh: bool = True  # rebuild the graph every epoch, else once
    graph: Literal["auto", "exact", "approximate"] = "auto"  # auto: exact up to a million images
    recall_floor: Annotated[float, Field(ge=0, lt=1)] = 0.9  # of true neighbours that an approximate graph must find
    duplicate_cosine: Annotated[float, Field(gt=0, le=1)] = 0.999  # neighbours above it count as near-duplicates
    skip_duplicates: bool = False  # take no near-duplicates: the neighbours are the k nearest others of the 2k nearest
    lars_learning_rate: Rate = 0.5  # peak rate of LARS (momentum 0.9, eta 0.001)
    lars_weight_decay: Rate = 1e-3  # of LARS; biases and norms have none
    adam_learning_rate: Rate = 1e-3  # peak rate of the -adam variants, which have no decay
    warmup_steps: Annotated[int, Field(ge=0)] = 0  # of a linear climb to the peak
    min_crop_area: PositiveFraction = 0.25  # smallest fraction of the image in a random crop
    checkpoint_steps: Count = 20  # steps between checkpoints

    def of_variant(self, name: str) -> dict[str, Any]:
        """The settings that decide the result of one variant, once `graph` is settled. An exact graph is left out."""
        variant = Variant.parse(name)
        unused = "lars_" if variant.optimizer == "adam" else "adam_"
        left_out = {"checkpoint_steps", "variants", "micro_batch"}
        if self.graph != "approximate":
            left_out |= {"graph", "recall_floor"}
        if variant.pairs != "neighbours":
            left_out |= {"neighbours", "refresh", "graph", "recall_floor", "duplicate_cosine", "skip_duplicates"}
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in left_out and not k.startswith(unused)}

    @model_validator(mode="after")
    def _distinct(self) -> FuseConfig:
        if len(set(self.variants)) < len(self.variants) or not self.variants:
            raise ValueError(f"fuse.variants must be distinct and not empty, got {list(self.variants)}")
        return self


class EvaluateConfig(Section):
    gallery_queries: Annotated[int, Field(ge=0)] = 4  # queries of a task that the report shows
    gallery_hits: Count = 5  # neighbours shown for each
    view_queries: Annotated[int, Field(ge=0)] = 512  # images whose augmented view is searched for its source
    train_images: Count = 20_000  # without data.test this many training images, in whole shards, are evaluated instead
    # The exported model: auto, backbone, `k=<K>` or a variant. auto: the best on half of the labelled test queries, and
    # without labels the last of fuse.variants that is no baseline
    export: Annotated[str, BeforeValidator(lambda value: AUTO if value is None else value)] = AUTO
    strengths: tuple[Annotated[float, Field(ge=0, le=MOST_STRENGTH)], ...] = ()  # of adaptation: rows `average@0.5`

    @model_validator(mode="after")
    def _distinct(self) -> EvaluateConfig:
        if len(set(self.strengths)) < len(self.strengths):
            raise ValueError(f"evaluate.strengths must be distinct, got {list(self.strengths)}")
        if 1 in self.strengths:
            raise ValueError(
                "evaluate.strengths has 1, the model as trained, which has a row in any case: leave it out"
            )
        return self


class Resources(Section):
    """Where it runs. No setting here changes which rows are in a batch; more ranks change float rounding only."""

    workers: Count | Literal["auto"] = "auto"  # long-lived processes; auto: one per GPU, else per cpus_per_worker CPUs
    cpus_per_worker: Count | Literal["auto"] = "auto"  # that Ray reserves; auto: a GPU's part of its node, else 1
    gpus_per_worker: Literal[0, 1, "auto"] = "auto"  # 0: on CPUs, whatever GPUs there are
    adapt_ranks: Count = 1  # ranks per adaptor job; jobs run side by side as far as the workers go
    centroid_shards: Count | Literal["auto"] = "auto"  # slices of the centroids of k-means; auto: by K and memory
    threads: Count | Literal["auto"] = "auto"  # torch and faiss threads per worker; auto: cpus_per_worker
    decode_threads: Count | Literal["auto"] = "auto"  # of a worker, read ahead; auto: its CPUs beside a GPU, else 2
    max_restarts: Annotated[int, Field(ge=0)] = 3  # of one job or shard, after its process died
    elastic: bool = False  # go on with fewer workers where some are gone or missing, and use nodes that join
    placement_timeout_s: Annotated[float, Field(gt=0)] = 300.0  # how long a worker may take to be placed and start
    compile: Literal["never", "auto"] = "never"  # torch.compile for adaptor jobs; auto: on a GPU where it pays
    collective_timeout_s: Annotated[float, Field(gt=0)] = 600.0  # how long a rank waits for others in a collective
    num_cpus: Count | None = None  # CPUs of the local Ray that the program starts; null: all
    cache_dir: PathText | None = None  # blocks of remote shards; null: `grappa-cache-<uid>` in a node's TMPDIR
    cache_bytes: Annotated[int, Field(ge=0)] = 16 * 2**30  # 16 GiB, of all processes of a node together; 0: none
    requests_in_flight: Count = 16  # to remote shards, of one process
    copies_dir: PathText | None = None  # gets a node's copies of a run on an object store; null: a node's TMPDIR
    copies_bytes: Annotated[int, Field(ge=0)] | None = None  # most of finished artefacts there; null: by free space
    checkpoint_s: Annotated[float, Field(gt=0)] | None = 300.0  # training also saves its state after so long; null: no
    gpu_log_s: Annotated[float, Field(ge=0)] = 3.0  # between looks at the figures of training on a GPU; all are logged
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()  # also log the metrics of adaptor jobs


class Config(Section):
    name: str  # title of the report, name of the default run directory
    out: PathText | None = None  # the run directory, or s3://<bucket>/<prefix>, gs://<...>; null: `runs/<name>`
    seed: Annotated[int, Field(ge=0)] = 0  # of k-means, initial weights, order, augmentation, neighbours, samples
    notes: tuple[str, ...] = ()  # shown in the report, e.g. what the backbone was trained with
    data: DataConfig
    backbone: BackboneConfig
    embed: EmbedConfig = EmbedConfig()
    clustering: ClusteringConfig = ClusteringConfig()
    adapt: AdaptConfig = AdaptConfig()
    fuse: FuseConfig = FuseConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    resources: Resources = Resources()

    @model_validator(mode="before")
    @classmethod
    def _without_mirror(cls, tree: Any) -> Any:
        """Earlier versions had the setting `mirror`, null in most of the settings that they wrote."""
        if not isinstance(tree, dict) or "mirror" not in tree:
            return tree
        if tree["mirror"] is not None:
            raise ValueError(
                f"mirror={tree['mirror']!r}: there is no such setting any more, expected null; "
                "out: s3://<bucket>/<prefix> or gs://<...> keeps the run itself in a bucket"
            )
        return {key: value for key, value in tree.items() if key != "mirror"}

    @model_validator(mode="after")
    def _export_exists(self) -> Config:
        asked, ks = self.evaluate.export, self.clustering.num_labels
        sets = [asked] * bool(re.fullmatch(r"k=[1-9]\d*", asked)) if ks == "auto" else [f"k={k}" for k in ks]
        others = [SUPERVISED_SET] if self.adapt.supervised else []
        if asked not in (allowed := [AUTO, BACKBONE, *sets, *self.fused, *others]):
            raise ValueError(
                f"evaluate.export={asked!r}: expected one of {', '.join(allowed)}"
                f"{' or k=<K> of a set' if ks == 'auto' else ''}{suggestion(asked, allowed)}"
            )
        return self

    @property
    def fused(self) -> list[str]:
        """The rows of `fuse.variants`, each among those of the same at the strengths that are evaluated, if any."""
        strengths = sorted([*self.evaluate.strengths, 1.0])
        rows = {name: strengths if VARIANTS[name].has_strengths else [1.0] for name in self.fuse.variants}
        return [at_strength(name, strength) for name, of_name in rows.items() for strength in of_name]

    @property
    def exported(self) -> str:
        """The model that is exported where no labelled test images choose it."""
        of_method = [name for name in self.fuse.variants if not Variant.parse(name).is_baseline]
        return (of_method or self.fuse.variants)[-1] if self.evaluate.export == AUTO else self.evaluate.export

    @property
    def has_test(self) -> bool:
        """Whether there are test images; else training images are evaluated in their place."""
        return bool(self.data.test or self.data.collection)

    def absolute(self, root: Path) -> Config:
        """The same settings for any working directory: local paths of files are absolute, `out` is the run directory.

        Args:
            root: the run directory.
        """
        of = absolute_path
        shards_dir = self.data.shards_dir and of(self.data.shards_dir)
        data = {key: tuple(map(of, getattr(self.data, key))) for key in ("train", "test", "exclude")}
        checkpoint, where = self.backbone.checkpoint, self.resources
        places = {key: place and of(place) for key in ("cache_dir", "copies_dir") for place in [getattr(where, key)]}
        return self.model_copy(
            update={
                "out": of(str(root)),
                "data": self.data.model_copy(update={**data, "shards_dir": shards_dir}),
                "backbone": self.backbone.model_copy(update={"checkpoint": checkpoint and of(checkpoint)}),
                "resources": where.model_copy(update=places),
            }
        )

    def yaml(self) -> str:
        """The settings as a file that `load` reads as this config."""

        def quoted(value: Any) -> Any:
            if isinstance(value, str):
                return _VARIABLE.sub(lambda found: f"${found[0]}", value)
            return [quoted(path) for path in value] if isinstance(value, list) else value

        tree = self.model_dump(mode="json")
        if not self.data.exclude:  # reports are named by this text, and those of earlier versions have no such settings
            del tree["data"]["exclude"], tree["data"]["duplicates"]
        if not self.evaluate.strengths:
            del tree["evaluate"]["strengths"]
        later = {"checkpoint_s": 300.0, "gpu_log_s": 3.0, "copies_dir": None, "copies_bytes": None}  # likewise
        tree["resources"] = {k: v for k, v in tree["resources"].items() if (k, v) not in later.items()}
        for section, *keys in _PATH_SETTINGS:
            of_section = tree[section] if section else tree
            of_section.update({key: quoted(of_section[key]) for key in keys if key in of_section})
        return yaml.safe_dump(tree, sort_keys=False)


def fingerprint(*parts: Any) -> str:
    """Ten hex digits over JSON-able parts and sections; equal settings give equal names on any machine."""
    plain = [p.model_dump(mode="json") if isinstance(p, BaseModel) else p for p in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:10]


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The config of a YAML file and `key.sub=value` overrides (values are YAML).

    Raises:
        ValueError: naming the key, the value found and what would be right.
    """
    try:
        with open(expanded(str(path), "config"), "rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ValueError(f"config {path} is longer than {MOST_BYTES} bytes; expected a YAML file of settings")
        tree = parse(text)
    except FileNotFoundError:
        raise ValueError(f"config {str(path) or repr('')} does not exist") from None
    except IsADirectoryError:
        raise ValueError(f"config {path} is a folder, expected a YAML file of settings") from None
    except OSError as error:
        raise ValueError(f"config {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"config {path} is not valid YAML: {describe(error)}") from error
    if not isinstance(tree, dict):
        kind = {"NoneType": "nothing", "list": "a list", "str": "a text"}.get(type(tree).__name__, repr(tree))
        raise ValueError(f"config {path} holds {kind}, expected sections of settings: name, data, backbone and others")
    return read(tree, overrides)


def read(tree: dict[str, Any], overrides: Iterable[str] = ()) -> Config:
    """The config of a tree of settings, into which the overrides are written.

    Raises:
        ValueError: as of `load`.
    """
    for override in overrides:
        _set(tree, override)
    for key, secret in _secrets(tree):
        raise ValueError(
            f"{key}: {secret}, and settings are written into manifests, events, report and model; expected none "
            "(credentials belong in the environment or the libraries' own files)"
        )
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ValueError("; ".join(map(_describe, error.errors()[:3]))) from error


def _secrets(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The keys of settings that hold a credential, with how that is known; the value is not repeated."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            where = f"{key}.{name}".removeprefix(".")
            if isinstance(value, str) and value and is_secret_name(str(name)):
                yield where, "has the name of a credential"
            yield from _secrets(value, where)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _secrets(value, key)
    elif isinstance(tree, str) and has_secret(tree):
        yield key, "holds a credential (a user, password or signature in a URL, or the value of a secret variable)"


def _set(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {without_secrets(override)!r} must look like section.key=value")
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ValueError(f"override {without_secrets(override)!r}: {parent!r} is not a section")
        node = child
    try:
        node[leaf] = parse(text)
    except yaml.YAMLError as error:
        raise ValueError(f"override {without_secrets(override)!r}: the value is not valid YAML") from error


def _describe(problem: Mapping[str, Any]) -> str:
    branch = re.compile(r"constrained-|\w+\[")  # pydantic also names the member of a union that it tried
    where = ".".join(str(part) for part in problem["loc"] if not branch.match(str(part)))
    if problem["type"] == "extra_forbidden":
        known = sorted(_fields(problem["loc"][:-1]))
        hint = suggestion(str(problem["loc"][-1]), known) or f"; known keys: {', '.join(known)}"
        return f"unknown key {where}{hint}"
    if problem["type"] == "missing":
        return f"{where} is missing"
    if problem["type"] == "literal_error":
        known = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        return f"{where}={problem['input']!r}: {problem['msg']}{suggestion(str(problem['input']), known)}"
    if problem["type"] == "string_pattern_mismatch":
        return f"{where}={problem['input']!r}: must be <module>:<function>, or timm:<model> for a backbone"
    if problem["type"] == "model_type":
        return f"{where}={_as_yaml(problem['input'])}: expected settings below it"
    if problem["input"] is None:
        return f"{where}=null: {problem['msg']}"
    message = problem["msg"].removeprefix("Value error, ").replace("tuple", "list")
    return message if problem["type"] == "value_error" else f"{where}={problem['input']!r}: {message}"


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()[:100]


def _fields(loc: Iterable[str | int]) -> set[str]:
    section: Any = Config
    for part in loc:
        section = section.model_fields[part].annotation
    return set(section.model_fields)
