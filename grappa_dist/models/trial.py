"""What a backbone is said to be, tried on images of noise before a run relies on it.

Shapes: B images, S pixels a side, T tokens, D channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grappa_dist.config import BackboneConfig, fingerprint
from grappa_dist.distributed.preflight import versions
from grappa_dist.files import read_json, write_json
from grappa_dist.models.backbone import Backbone, create_backbone
from grappa_dist.models.grappa import Grappa
from grappa_dist.models.spec import backbone_settings, build_backbone
from grappa_dist.models.weights import listed, load_tensors, tensors_of

VERDICT_FILE = "backbone.json"  # in the index folder of a run
RULES = 2  # of what is refused: a verdict by earlier ones is not read again
KEPT_FROM_S = 1.0  # a trial of a user's own module that takes longer is not made again
ROUNDING = 1e-5  # of the length of a feature: far above the rounding of one computation in another order
ALIKE = 1e-3  # the same of two ways to compute it
OTHER_CPU = 1e-5  # of a sum: values computed on a CPU of another kind differ by less
BF16_COSINE = 0.99  # of a feature in bfloat16 with that in float32: 0.9999 is usual
BOTTLENECK = 4
NAMED = 3  # tensors that a message names


@dataclass(frozen=True)
class Weights:
    """What tells two backbones apart: a digest of all tensors, and for each the sums of its values and their sizes."""

    digest: str
    sums: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Verdict:
    """Of a backbone that can be used."""

    weights: Weights
    warnings: tuple[str, ...]


def verdict_of(
    config: BackboneConfig, index: Path, *, keep: bool = True, log: Callable[[str], None] = lambda text: None
) -> Verdict:
    """As `try_backbone`; the next run reads the verdict again if it is of a timm model or took more than a second.

    Of a timm model also because a plan that knows it need not import timm, which takes seconds.

    Args:
        index: the index folder of the run.
        keep: whether to write there.
        log: is given a line before the backbone is tried.

    Raises:
        ValueError: the backbone cannot be used, and why.
    """
    path, of = index / VERDICT_FILE, _of(config)
    if known := _kept(path, of):
        return known
    log(f"backbone: building {config.name} and trying it on two images")
    began = time.monotonic()
    verdict = try_backbone(config)
    if keep and (config.name.startswith("timm:") or time.monotonic() - began > KEPT_FROM_S):
        write_json(path, {"of": of, **asdict(verdict)})
    return verdict


def known_verdict(config: BackboneConfig, index: Path) -> Verdict | None:
    """The verdict that an earlier run has kept of that backbone, in these versions; builds and imports nothing."""
    path = index / VERDICT_FILE
    return _kept(path, _of(config)) if path.is_file() else None


def _of(config: BackboneConfig) -> str:
    return fingerprint({"backbone": backbone_settings(config), "versions": versions(), "rules": RULES})


def _kept(path: Path, of: str) -> Verdict | None:
    """The verdict in a file, if it is of that backbone."""
    try:
        found = read_json(path) if path.is_file() else {}
        if found.get("of") != of:
            return None
        sums = {name: (float(a), float(b)) for name, (a, b) in found["weights"]["sums"].items()}
        return Verdict(Weights(found["weights"]["digest"], sums), tuple(found["warnings"]))
    except (ValueError, LookupError, TypeError, AttributeError):  # a damaged file
        return None


def try_backbone(config: BackboneConfig) -> Verdict:
    """Builds the backbone and tries all that a run relies on: features, gradients, adaptors, and export.

    Raises:
        ValueError: the backbone cannot be used, and why.
    """
    name, in_bf16 = f"backbone.name={config.name}", config.computes_in == "bf16"
    with torch.random.fork_rng(devices=()):  # what a user's function draws from the global generator
        backbone = build_backbone(_in_fp32(config))
        weights = weights_of(backbone)
        images = _noise(backbone.preprocess.image_size)
        if not backbone.is_timms:
            _check_own_forward(name, backbone, images)
        warnings = [*backbone.remarks, *_check_features(name, backbone, images)]
        if _digest(backbone) != weights.digest:
            raise ValueError(f"{name}: a forward pass changes its buffers; a frozen model must stay as it is")
        if in_bf16:
            warnings += _check_bf16(name, backbone, build_backbone(config), images)
        _check_export(name, config, backbone, weights, images[:1])
    return Verdict(weights, tuple(warnings))


def _in_fp32(config: BackboneConfig) -> BackboneConfig:
    """With the weights as they are given; the precision only says in what they are held and multiplied."""
    return config.model_copy(update={"precision": "fp32"})


@torch.no_grad()
def _check_bf16(name: str, backbone: Backbone, in_bf16: Backbone, images: Tensor) -> list[str]:
    """A warning where the features are far from those in float32.

    Raises:
        ValueError: products in bfloat16 fail, or make features that are not finite.
    """
    what, right = "a forward pass with backbone.precision=bf16", backbone(images)
    found: Tensor = _run(name, what, lambda: in_bf16(images))
    if not bool(found.isfinite().all()):
        raise ValueError(f"{name}: {what} makes features that are not finite; give backbone.precision=fp32")
    cosine = float(torch.cosine_similarity(found, right).min())
    if cosine >= BF16_COSINE:
        return []
    return [f"{name}: features with backbone.precision=bf16 are far from those in fp32, by cosine {cosine:.3f}"]


def check_shapes(config: BackboneConfig, backbone: Backbone) -> None:
    """Runs a backbone without weights, on the device meta, for the shapes of its features and of its blocks' tokens.

    Raises:
        ValueError: they are others than adaptors need.
    """
    name, size = f"backbone.name={config.name}", backbone.preprocess.image_size
    with torch.no_grad(), _watched_blocks(name, backbone, 2):
        images = torch.zeros(2, 3, size, size, device="meta")
        features = _run(name, f"a forward pass of images of {size} pixels", lambda: backbone(images))
    _check_shape(name, features, (2, backbone.embed_dim))


def weights_of(module: nn.Module) -> Weights:
    """Of all parameters and buffers, those left out of state dicts among them."""
    sums = dict[str, tuple[float, float]]()
    for name, tensor in _tensors(module):
        values = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
        values = values.double()
        sums[name] = (float(values.sum()), float(values.abs().sum()))
    return Weights(_digest(module), sums)


def _digest(module: nn.Module) -> str:
    digest = xxhash.xxh3_128()
    for name, tensor in _tensors(module):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers, once each, by name."""
    yield from sorted(chain(module.named_parameters(), module.named_buffers()), key=lambda pair: pair[0])


def describe_difference(config: BackboneConfig, expected: Weights) -> str:
    """Why the backbone that is built in this process is not the expected one, or "".

    A digest alone would refuse a node whose CPU computes, say, sines of positions with other last bits.
    """
    try:
        with torch.random.fork_rng(devices=()):
            found = weights_of(build_backbone(_in_fp32(config)))
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        return f"the backbone cannot be built: {' '.join(str(error).split())}"
    why = _difference(found, expected)
    return f"the backbone is built with other weights than on the driver: {why}" if why else ""


def _difference(found: Weights, expected: Weights) -> str:
    if found.digest == expected.digest:
        return ""
    names = sorted(found.sums.keys() | expected.sums.keys())
    differing = [name for name in names if not _near(found.sums.get(name), expected.sums.get(name))]
    if not differing:
        return ""
    return f"{listed(differing)}; does its function draw random numbers, or read a file that differs?"


def _near(a: tuple[float, float] | None, b: tuple[float, float] | None) -> bool:
    if a is None or b is None:
        return False
    limit = OTHER_CPU * max(a[1], b[1])
    return all(abs(x - y) <= limit or x == y or x != x for x, y in zip(a, b, strict=True))


def _noise(size: int) -> Tensor:
    """Two images of noise, the second one darker: (2, 3, S, S) in [0, 1]."""
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    images[1] *= 0.5
    return images


def _run(name: str, what: str, function: Callable[[], Any]) -> Any:
    """What a user's code returns.

    Raises:
        ValueError: it raises something.
    """
    try:
        return function()
    except Exception as error:  # a user's module may raise anything
        text = " ".join(str(error).split())[:300]
        raise ValueError(f"{name}: {what} raises {type(error).__name__}: {text}") from error


def _check_features(name: str, backbone: Backbone, images: Tensor) -> list[str]:
    """Warnings on the features of images, and on parameters that do not change them.

    Raises:
        ValueError: they are of a wrong shape or type, not finite, or not a function of the image alone.
    """
    bad = [key for key, tensor in backbone.model.named_parameters() if not bool(tensor.isfinite().all())]
    if bad:
        raise ValueError(f"{name}: its weights are not finite (NaN or infinite): {listed(bad)}")
    what = f"a forward pass of images of {images.shape[-1]} pixels"
    with _tracked(backbone), _watched_blocks(name, backbone, len(images)):
        together: Tensor = _run(name, what, lambda: backbone(images))
        _check_form(name, together, (len(images), backbone.embed_dim), backbone.model)
        unseen = _unseen_by_gradients(backbone.model, together)
    with torch.no_grad():
        alone, again = (_run(name, what, lambda: backbone(images[:1])) for _ in range(2))
        if _distance(alone, again) > ROUNDING:
            raise ValueError(
                f"{name}: the same image has other features at each pass, as where dropout is left on; it must be "
                "deterministic in eval mode"
            )
        if _distance(alone, together[:1]) > ALIKE:
            raise ValueError(
                f"{name}: an image has other features alone than beside another one, as where a BatchNorm uses the "
                "statistics of the batch; its features must depend on the image alone"
            )
        # where no gradient flows at all, all are unseen, which takes long to tell apart and is refused later
        unused = _unused(backbone, unseen, images[:1], alone) if together.requires_grad else []
    _refuse_unused_tokens(name, unused)
    return _warnings(name, together, unused)


def _check_shape(name: str, features: object, shape: tuple[int, int]) -> None:
    if not isinstance(features, Tensor):
        raise ValueError(f"{name}: features are a {type(features).__name__}, expected a tensor (B, embed_dim)")
    if tuple(features.shape) != shape:
        raise ValueError(
            f"{name}: features of {shape[0]} images are {tuple(features.shape)}, expected (B, embed_dim), here {shape}"
        )


def _check_form(name: str, features: Tensor, shape: tuple[int, int], model: nn.Module) -> None:
    _check_shape(name, features, shape)
    if features.dtype != torch.float32:
        raise ValueError(f"{name}: features are {features.dtype}, expected torch.float32")
    if not bool(features.isfinite().all()):
        buffers = [key for key, tensor in model.named_buffers() if bool(tensor.isnan().any())]
        of = f"; its buffer {buffers[0]} is NaN" if buffers else ", though its weights are"
        raise ValueError(f"{name}: features of images of noise are not finite (NaN or infinite){of}")


def _warnings(name: str, features: Tensor, unused: Sequence[str]) -> list[str]:
    found = []
    if _distance(features[:1], features[1:]) <= ROUNDING:
        found.append(f"{name}: two images of noise have features that are all alike: are these its weights?")
    if unused:
        found.append(
            f"{name}: {len(unused)} of its parameters change no feature: {', '.join(unused[:NAMED])}"
            + ", ..." * (len(unused) > NAMED)
        )
    return found


def _refuse_unused_tokens(name: str, unused: Sequence[str]) -> None:
    """Raises ValueError for parameters of the module itself that change nothing: its class token, its positions."""
    tokens = [key for key in unused if "." not in key and "mask" not in key]
    if tokens:
        raise ValueError(
            f"{name}: {', '.join(tokens)} of the module itself change no feature, since patch_embed, blocks and norm "
            f"are run one after the other. {_REMEDY}"
        )


_REMEDY = (
    "Add class token and positions in patch_embed, or give the module forward_features(x) and forward_head(x, "
    "pre_logits) as timm's models have them (docs/extending.md has an example)"
)


def _distance(a: Tensor, b: Tensor) -> float:
    """Of features, as a part of their length."""
    a, b = a.detach().double(), b.detach().double()
    scale = max(float(a.norm()), float(b.norm()))
    return float((a - b).norm()) / scale if scale else 0.0


@contextmanager
def _tracked(module: nn.Module) -> Iterator[None]:
    """While inside, all parameters take part in gradients."""
    module.requires_grad_(True)
    try:
        yield
    finally:
        module.requires_grad_(False)


@contextmanager
def _watched_blocks(name: str, backbone: Backbone, num_images: int) -> Iterator[None]:
    """Raises ValueError at the end for blocks that were not called, and at once for one without (B, T, D)."""
    called = set[int]()

    def check(index: int, tokens: object) -> None:
        called.add(index)
        right = isinstance(tokens, Tensor) and tokens.ndim == 3
        if not right or tokens.shape[::2] != (num_images, backbone.embed_dim):  # type: ignore[attr-defined]
            made = tuple(tokens.shape) if isinstance(tokens, Tensor) else f"a {type(tokens).__name__}"
            raise ValueError(
                f"blocks[{index}] makes {made}, expected tokens (B, T, embed_dim), here "
                f"({num_images}, T, {backbone.embed_dim})"
            )

    def hook(index: int) -> Callable[..., None]:
        return lambda module, given, made: check(index, made)

    blocks = list(backbone.blocks)
    hooks = [block.register_forward_hook(hook(i)) for i, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
    _refuse_skipped(name, [i for i in range(len(blocks)) if i not in called])


def _refuse_skipped(name: str, skipped: Sequence[int]) -> None:
    if skipped:
        raise ValueError(
            f"{name}: its forward pass does not go through blocks[{skipped[0]}], or lets no gradient through (no_grad, "
            "detach), so an adaptor behind it would learn nothing"
        )


def _reached(features: Tensor) -> set[int]:
    """Ids of the tensors that features were computed from, as far as gradients would flow."""
    reached, seen, left = set[int](), set[Any](), [features.grad_fn]
    while left:
        node: Any = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        left.extend(following for following, _ in node.next_functions)
    return reached


def _unseen_by_gradients(module: nn.Module, features: Tensor) -> list[str]:
    reached = _reached(features)
    return [name for name, parameter in module.named_parameters() if id(parameter) not in reached]


def _unused(backbone: Backbone, names: Sequence[str], image: Tensor, right: Tensor) -> list[str]:
    """Those of the parameters that do not change the features: gradients are cut where a forward has `no_grad`."""
    if not names:
        return []
    parameters = [dict(backbone.model.named_parameters())[name] for name in names]
    kept = [parameter.detach().clone() for parameter in parameters]
    rng = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.add_(torch.randn(parameter.shape, generator=rng))
    try:
        unchanged = torch.equal(backbone(image), right)
    finally:
        for parameter, before in zip(parameters, kept, strict=True):
            parameter.copy_(before)
    if unchanged:
        return list(names)
    if len(names) == 1:
        return []
    middle = len(names) // 2
    return [name for part in (names[:middle], names[middle:]) for name in _unused(backbone, part, image, right)]


@torch.no_grad()
def _check_own_forward(name: str, backbone: Backbone, images: Tensor) -> None:
    """Compares the features with what the module's own `forward` and `forward_features` make of the images.

    Raises:
        ValueError: they differ, or the blocks get other tokens there.
    """
    x = (images - backbone.mean) / backbone.std
    with _watched_blocks(name, backbone, len(images)):
        features, tokens = _run(name, "a forward pass", lambda: _with_first_tokens(backbone, lambda: backbone(images)))
    if not isinstance(features, Tensor) or not bool(features.isfinite().all()):
        return  # which is refused by itself
    for method in ("forward", "forward_features"):
        own: Any = getattr(backbone.model, method, None)
        if own is None or getattr(type(backbone.model), method, None) is getattr(nn.Module, method, _ABSENT):
            continue
        try:
            made, own_tokens = _with_first_tokens(backbone, partial(own, x))
        except Exception:  # it takes other arguments, or belongs to a training
            continue
        candidates = list(_features_in(made, features.shape))
        if any(_distance(candidate, features) < ALIKE for candidate in candidates):
            return
        _refuse_other_tokens(name, method, tokens, own_tokens)
        if candidates:
            cosine = float(torch.cosine_similarity(candidates[0].double(), features.double()).mean())
            raise ValueError(
                f"{name}: token 0 behind norm is not what its own {method} returns (mean cosine {cosine:.2f}). Give "
                "the module forward_features(x) and forward_head(x, pre_logits), as timm's models have them, which "
                "make the features that you want, or leave its forward away"
            )


_ABSENT = object()


def _with_first_tokens(backbone: Backbone, run: Callable[[], Any]) -> tuple[Any, Tensor | None]:
    """What a pass returns, and the tokens that the first block got in it; None if it was not called."""
    entered = list[Tensor]()
    hook = next(iter(backbone.blocks)).register_forward_pre_hook(lambda _, given: entered.extend(given[:1]))
    try:
        made = run()
    finally:
        hook.remove()
    return made, entered[0] if entered else None


def _refuse_other_tokens(name: str, method: str, ours: Tensor | None, own: Tensor | None) -> None:
    if ours is None or own is None or (ours.shape == own.shape and _distance(ours, own) < ALIKE):
        return
    shapes = f"{tuple(own.shape)}, and from patch_embed {tuple(ours.shape)}"
    raise ValueError(
        f"{name}: in its own {method} the blocks get tokens that patch_embed does not make: {shapes}. {_REMEDY}"
    )


def _features_in(made: Any, shape: Sequence[int]) -> Iterator[Tensor]:
    """What may be the features (B, D) in something that a forward returned: as they are, or token 0 of (B, T, D)."""
    if isinstance(made, Mapping):
        made = list(made.values())
    if isinstance(made, list | tuple):
        for part in made:
            yield from _features_in(part, shape)
    elif isinstance(made, Tensor) and made.shape == shape:
        yield made
    elif isinstance(made, Tensor) and made.ndim == 3 and made[:, 0].shape == shape:
        yield made[:, 0]


def _check_export(name: str, config: BackboneConfig, backbone: Backbone, weights: Weights, image: Tensor) -> None:
    """Puts adaptors into the backbone, and takes the untrained model through export and back.

    Raises:
        ValueError: adaptors do nothing, another call builds other weights, or the loaded model has other features.
    """
    pixels = asdict(backbone.preprocess)
    model: Grappa = _run(name, "putting adaptors behind its blocks", lambda: _with_adaptors(backbone))
    for layer in model.layers:
        layer.adaptors.requires_grad_(True)
    right = _run(name, "a forward pass with adaptors", lambda: model(image))
    reached = _reached(right)
    _refuse_skipped(name, [i for i, one in enumerate(model.layers) if id(one.adaptors.up_bias) not in reached])
    again = create_backbone(config.name, config.kwargs, pixels, pretrained=False, pool=config.pool)
    given = config.name.startswith("timm:") or config.checkpoint
    if why := "" if given else _difference(weights_of(again), weights):
        raise ValueError(
            f"{name}: each call makes other weights ({why}), so workers would have different models. Give the weights "
            "as backbone.checkpoint, or draw them after torch.manual_seed"
        )
    loaded = _with_adaptors(again)
    with TemporaryDirectory(prefix="grappa-export-") as folder:  # its tensors are then mapped, not copied
        path = Path(folder) / "model.safetensors"
        _run(name, "its export", lambda: save_file(tensors_of(model.requires_grad_(False)), path))
        missing, unexpected = _run(name, "loading its export", lambda: load_tensors(loaded, load_file(path)))
    with torch.no_grad():
        differs = _distance(_run(name, "a forward pass after export", lambda: loaded(image)), right) > ROUNDING
    if missing or unexpected or differs:
        where = f": {', '.join([*missing, *unexpected][:NAMED])}" if missing or unexpected else ""
        raise ValueError(
            f"{name}: exported and loaded again, the model has other features{where}; does it hold tensors that are "
            "neither parameters nor buffers, or buffers of random values with persistent=False?"
        )


def _with_adaptors(backbone: Backbone) -> Grappa:
    """A model of one random adaptor set; wraps the blocks in place."""
    model = Grappa(backbone, 1, BOTTLENECK, attention=True)
    rng = torch.Generator().manual_seed(0)
    for layer in model.layers:
        layer.adaptors.randomise(rng)
        assert layer.attention is not None
        layer.attention.initialise(rng)
    return model.requires_grad_(False).eval()
