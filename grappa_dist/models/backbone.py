"""The frozen ViT, from timm or from a user's own function; it is checked on one image before it is used.

Shapes: B images, S pixels a side, T tokens, D channels.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grappa_dist._compat import declare_torchvision_ops
from grappa_dist.data.transforms import Preprocess
from grappa_dist.functions import check_arguments, describe_raised, import_function
from grappa_dist.models.precision import Precision, hold_weights, products_in
from grappa_dist.models.weights import load_own, timm_with_weights
from grappa_dist.output import suggestion

# Arguments of timm.create_model that a run sets itself, or that would read files which a model names
_SET_HERE = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "num_classes"}
_LARGEST_PATCH = 64  # pixels at the lower edge that are tried before they count as seen
Patches = Callable[[Tensor], Any]  # images to tokens
_TRIAL_SCALE = 0.1  # of the weights that a model on "meta" is tried with


class Backbone(nn.Module):
    """The frozen ViT, always in eval mode: RGB in [0, 1] (B, 3, S, S) -> image features z (B, D), not normalised.

    Also the model that it becomes when its blocks are wrapped: all of it computes in `precision`, on any device and
    whatever autocast surrounds it.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, preprocess: Preprocess, remarks: Sequence[str] = ()) -> None:
        super().__init__()
        _check_parts(model)
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()  # the engine broadcasts bytes and refuses strides
        self.model = model.requires_grad_(False).eval()
        self.preprocess = preprocess
        self.remarks = tuple(remarks)  # on its weights
        self.precision: Precision = "fp32"
        self.embed_dim = int(model.embed_dim)  # type: ignore[arg-type]
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std).view(1, 3, 1, 1), persistent=False)

    @property
    def blocks(self) -> Any:
        """The transformer blocks, a ModuleList or Sequential that can be assigned to."""
        return self.model.blocks

    @property
    def is_timms(self) -> bool:
        """Whether it has the two methods of timm's models, which add registers, poolings and norms."""
        return hasattr(self.model, "forward_features") and hasattr(self.model, "forward_head")

    def train(self, mode: bool = True) -> Backbone:
        """Stays in eval mode: the method has no dropout or batch statistics in the frozen model."""
        return super().train(False)

    def compute_in(self, precision: Precision) -> Backbone:
        """From here on computes in this precision; to be called once the weights are loaded."""
        self.precision = precision
        hold_weights(self.model, precision)
        return self

    def forward(self, images: Tensor) -> Tensor:
        with products_in(self.precision, images.device):
            z = self.features((images - self.mean) / self.std)
        return z if self.precision == "fp32" else z.to(images.dtype)

    def features(self, pixels: Tensor) -> Tensor:
        """The same of images that are normalised, in the type of the weights and of autocast."""
        model: Any = self.model
        if self.is_timms:
            return model.forward_head(model.forward_features(pixels), pre_logits=True)
        tokens = model.patch_embed(pixels)
        for block in model.blocks:
            tokens = block(tokens)
        return model.norm(tokens)[:, 0]


def _check_parts(model: nn.Module) -> None:
    """Raises ValueError for a module without the parts of a ViT that adaptors are put into."""
    parts: Any = model
    what = f"backbone.name: {type(model).__name__}"
    missing = [name for name in ("patch_embed", "blocks", "norm", "embed_dim") if not hasattr(model, name)]
    if missing:
        raise ValueError(f"{what} has no {', '.join(missing)}; it needs patch_embed, blocks, norm, embed_dim")
    for name in ("patch_embed", "norm"):
        if not callable(getattr(model, name)) or isinstance(getattr(model, name), nn.ModuleList):
            raise ValueError(f"{what}.{name} is a {type(getattr(model, name)).__name__}, expected one module to call")
    if not isinstance(parts.blocks, nn.ModuleList | nn.Sequential) or not len(parts.blocks):
        of = "an empty " * (isinstance(parts.blocks, nn.Module) and not len(list(parts.blocks.children()))) or "a "
        raise ValueError(
            f"{what}.blocks is {of}{type(parts.blocks).__name__}, expected a ModuleList or Sequential of the blocks"
        )
    if not isinstance(parts.embed_dim, int) or isinstance(parts.embed_dim, bool) or parts.embed_dim < 1:
        raise ValueError(f"{what}.embed_dim is {parts.embed_dim!r}, expected the number of channels, an int")


def create_backbone(
    name: str,
    kwargs: Mapping[str, Any],
    overrides: Mapping[str, Any],
    *,
    checkpoint: str | None = None,
    pretrained: bool = True,
    pool: str | None = None,
) -> Backbone:
    """The backbone called `timm:<model>` or `<module>:<function>`.

    Args:
        overrides: fields of `Preprocess`; what is absent comes from timm's data config, else it is ImageNet's.
        checkpoint: a local file of weights (safetensors, or a torch file that loads with weights_only).
        pretrained: False builds the architecture only, for weights that are loaded afterwards.
        pool: how the tokens of a timm model become a feature: "token", "avg" or "map"; None: as timm has it.

    Raises:
        ValueError: an unknown model, function or file, a pooling that it has not, or weights that do not fit or cannot
            be downloaded.
    """
    source, _, function = name.partition(":")
    if source != "timm":
        if pool is not None:
            raise ValueError(f"backbone.pool={pool}: is for models of timm; {name} pools its tokens by itself")
        model = _call(source, function, kwargs)
        if checkpoint and pretrained:
            load_own(model, checkpoint)
        return Backbone(model, replace(_default_preprocess(model), **overrides))
    size = {"img_size": overrides["image_size"]} if "image_size" in overrides else {}
    model, remarks = _timm(function, {**size, **kwargs}, checkpoint if pretrained else None, pretrained)
    if pool is not None:
        _set_pool(model, name, pool)
    # timm's data config has the size of the pretraining, whatever size was asked for
    size = {"image_size": kwargs["img_size"]} if isinstance(kwargs.get("img_size"), int) else {}
    return Backbone(model, replace(_default_preprocess(model), **{**size, **overrides}), remarks)


@torch.no_grad()
def _set_pool(model: Any, name: str, pool: str) -> None:
    """Sets how a timm model pools its tokens, and sees on tokens of noise that it does; weights stay as they are.

    Raises:
        ValueError: the model has no such pooling.
    """
    before = getattr(model, "global_pool", None)
    try:
        model.reset_classifier(0, pool)
    except (AssertionError, AttributeError, TypeError) as error:
        why = f": {error}".rstrip(".: ")
        raise ValueError(f"backbone.pool={pool}: {name} has no such pooling{why}; timm's is {before!r}") from error
    if pool == "map" or next(model.parameters()).is_meta:
        return
    prefix, norm = model.num_prefix_tokens, model.fc_norm
    tokens = torch.randn(1, prefix + 4, model.embed_dim, generator=torch.Generator().manual_seed(0))
    expected = norm(tokens[:, 0] if pool == "token" else tokens[:, prefix:].mean(1))
    if not torch.allclose(model.eval().forward_head(tokens, pre_logits=True), expected, atol=1e-5):
        raise ValueError(f"backbone.pool={pool}: {name} pools its tokens in a way of its own, whatever is set")


def _default_preprocess(model: nn.Module) -> Preprocess:
    if not hasattr(model, "pretrained_cfg"):
        return Preprocess()
    declare_torchvision_ops()
    from timm.data.config import resolve_model_data_config

    given = resolve_model_data_config(model)
    return Preprocess(
        image_size=given["input_size"][1],
        interpolation=given["interpolation"],
        crop_share=given["crop_pct"],
        mean=tuple(given["mean"]),
        std=tuple(given["std"]),
    )


def _call(module: str, function: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """What a user's function returns, in float32 on the CPU."""
    name = f"backbone.name={module}:{function}"
    create = import_function("backbone.name", f"{module}:{function}")
    check_arguments(f"{name}: backbone.kwargs={dict(kwargs)}", create, kwargs)
    try:
        model = create(**kwargs)
    except (Exception, SystemExit) as error:  # a user's function may raise anything
        raise ValueError(f"{name}: {function}({_arguments(kwargs)}) raised {describe_raised(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name}: {function} returned a {type(model).__name__}, expected a torch.nn.Module")
    tensors = chain(model.named_parameters(), model.named_buffers())
    unset = [key for key, tensor in tensors if tensor.is_meta or nn.parameter.is_lazy(tensor)]
    if unset:
        raise ValueError(f"{name}: {unset[0]} has no values yet (a lazy module, or one on the device meta)")
    return _plain(model)


def _plain(model: nn.Module) -> nn.Module:
    """The module on the CPU, its numbers in float32, which holds those of half precision exactly."""
    model.cpu()
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            tensor.data = tensor.data.float()
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
            tensor.data = tensor.data.contiguous()  # one number in many places, into which nothing can be loaded
    return model


def _arguments(kwargs: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in kwargs.items())


def _timm(
    name: str, kwargs: Mapping[str, Any], checkpoint: str | None, pretrained: bool
) -> tuple[nn.Module, Sequence[str]]:
    """The model, and remarks on its weights."""
    _check_timm(name)
    if taken := sorted(_SET_HERE & kwargs.keys()):
        raise ValueError(f"backbone.kwargs has {taken[0]}, which is set here; weights are named by backbone.checkpoint")
    import timm

    if pretrained and not checkpoint:
        check_weights(f"timm:{name}")
    try:
        if pretrained:
            return timm_with_weights(name, kwargs, checkpoint)
        return timm.create_model(name, pretrained=False, num_classes=0, **kwargs), ()
    except (TypeError, AssertionError) as error:
        raise ValueError(f"backbone.kwargs={dict(kwargs)} do not suit timm:{name}: {error}") from error


def check_name(name: str, kwargs: Mapping[str, Any] | None = None) -> None:
    """Checks what can be checked of a backbone without building it; a user's own module is read and not imported.

    Raises:
        ValueError: this timm does not know the model; or there is no such module or function, or it does not take
            these arguments.
    """
    source, _, function = name.partition(":")
    if source == "timm":
        _check_timm(function)
    else:
        _check_function(name, source_of(name), function, kwargs or {})


@lru_cache
def source_of(name: str) -> str:
    """The path of the file of a user's own module; the module is not imported.

    Raises:
        ValueError: there is none.
    """
    module = name.partition(":")[0]
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # its package
        spec = None
    except (Exception, SystemExit) as error:  # the package is imported, and may raise anything
        raise ValueError(f"backbone.name={name}: importing its package raised {describe_raised(error)}") from error
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise ValueError(f"backbone.name={name}: there is no module {module!r}; is its folder on PYTHONPATH?")
    return spec.origin


def _check_function(name: str, path: str, function: str, kwargs: Mapping[str, Any]) -> None:
    if not path.endswith(".py"):
        return
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError) as error:
        where = f"line {error.lineno}: {error.msg}" if isinstance(error, SyntaxError) else str(error)
        raise ValueError(f"backbone.name={name}: {path} is no Python: {where}") from error
    found = _bound_names(tree)
    if function not in found and not found.keys() & {"*", "__getattr__", "globals"}:
        functions = [key for key, node in found.items() if isinstance(node, ast.FunctionDef) and key[0] != "_"]
        raise ValueError(
            f"backbone.name={name}: {path} has no {function!r}; its functions: {', '.join(functions) or 'none'}"
        )
    _check_imports(name, tree)
    node = found.get(function)
    if isinstance(node, ast.AsyncFunctionDef):
        raise ValueError(f"backbone.name={name}: {function!r} is a coroutine (async def), expected a function")
    if kind := _kinds_of_constants(tree).get(function):
        raise ValueError(f"backbone.name={name}: {function!r} is of type {kind}, expected a function")
    if isinstance(node, ast.FunctionDef) and not node.decorator_list:
        _check_static_arguments(name, node.args, kwargs)


def _check_imports(name: str, tree: ast.Module) -> None:
    """Raises ValueError for a package that a module imports in any case, and that is not installed."""
    module = name.partition(":")[0]
    for node in tree.body:
        named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            named = [node.module]
        for package in (found.partition(".")[0] for found in named):
            if package not in sys.modules and importlib.util.find_spec(package) is None:
                raise ValueError(f"backbone.name={name}: No module named {package!r}, which {module} imports")


def _kinds_of_constants(tree: ast.Module) -> dict[str, str]:
    """By name, the type of what a module's own level assigns where that is written out, such as a number or a list."""
    kinds = dict[str, str]()
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    kinds[target.id] = _kind_of(node.value)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            kinds.pop(node.name, None)
    return kinds


def _kind_of(value: ast.expr | None) -> str:
    """The type of a value that is written out; "" of any other expression."""
    try:
        return "" if value is None else type(ast.literal_eval(value)).__name__
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return ""


def _bound_names(tree: ast.AST) -> dict[str, ast.AST]:
    """Names of a module's own level with what binds them; "*" and "globals" where there may be others."""
    found = dict[str, ast.AST]()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = node
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).partition(".")[0]: node for alias in node.names}
        elif isinstance(node, ast.Name) and (isinstance(node.ctx, ast.Store) or node.id == "globals"):
            found[node.id] = node
        found |= _bound_names(node)
    return found


def _check_static_arguments(name: str, taken: ast.arguments, kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError for arguments that a function does not take, or lacks."""
    by_place = [argument.arg for argument in (*taken.posonlyargs, *taken.args)]
    needed = by_place[: len(by_place) - len(taken.defaults)]
    needed += [a.arg for a, default in zip(taken.kwonlyargs, taken.kw_defaults, strict=True) if default is None]
    known = {argument.arg for argument in (*taken.args, *taken.kwonlyargs)}
    missing, unknown = [key for key in needed if key not in kwargs], sorted(kwargs.keys() - known)
    if missing or (unknown and taken.kwarg is None):
        what = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(unknown)}, which it does not take"
        raise ValueError(f"backbone.name={name}: backbone.kwargs={dict(kwargs)} {what}")


def check_weights(name: str, *, download: bool = True) -> bool:
    """Whether the weights are on this machine; always so of another model than timm's.

    Raises:
        ValueError: timm has none for the model; or, with `download`, their hub cannot be reached either.
    """
    source, _, model = name.partition(":")
    if source != "timm":
        return True
    import timm

    cfg = timm.get_pretrained_cfg(model)
    if cfg is None or not cfg.has_weights:
        raise ValueError(
            f"backbone.name={name}: timm has no weights for it; name others (timm.list_pretrained()) or set "
            "backbone.checkpoint=FILE.safetensors"
        )
    cached = _are_cached(model)
    if download and not cached and not _is_hub_reachable():
        raise ValueError(
            f"the weights of backbone.name={name} are not in the local cache and their hub cannot be reached; "
            "download them elsewhere and set backbone.checkpoint=FILE.safetensors, or name another backbone "
            "(backbone.name=timm:<model> or <module>:<function>)"
        )
    return cached


def _check_timm(name: str) -> None:
    declare_torchvision_ops()
    import timm

    if not timm.is_model(name):
        hint = suggestion(name, [*timm.list_models(), *timm.list_pretrained()])
        raise ValueError(f"backbone.name=timm:{name}: timm {timm.__version__} has no such model{hint}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # the model exists, its weights of this name do not
        hint = suggestion(name, timm.list_pretrained(f"{name.partition('.')[0]}.*"))
        why = str(error).removesuffix(".")
        raise ValueError(f"backbone.name=timm:{name}: {why}{hint}") from error


def _are_cached(name: str) -> bool:
    """Whether timm will find the weights on this machine, or raise its own error at once."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        return True
    files = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    return any(isinstance(try_to_load_from_cache(cfg.hf_hub_id, file), str) for file in files)


def _is_hub_reachable() -> bool:
    """Checked first because timm's own retries take a minute."""
    from huggingface_hub import constants

    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except OSError:
        return False
    return True


def check_image_size(backbone: Backbone, name: str, kwargs: Mapping[str, Any]) -> None:
    """Runs `patch_embed` on one image; a backbone without weights (on "meta") is tried with random ones.

    Raises:
        ValueError: the model was made for another size, its patches leave out pixels at the edge, or its tokens are not
            (B, T, D); the message has what would be right.
    """
    with torch.no_grad(), torch.device("cpu"):  # models may be built under another default device
        _check(backbone, name, kwargs)


def _check(backbone: Backbone, name: str, kwargs: Mapping[str, Any]) -> None:
    patches = _on_cpu(backbone.model.patch_embed)  # type: ignore[arg-type]
    size = backbone.preprocess.image_size
    wrong = f"backbone.image_size={size} does not suit backbone.name={name}"
    try:
        tokens = _tokens(patches, torch.zeros(1, 3, size, size))
    except Exception as error:  # a user's module may raise anything
        right = _accepted_size(patches, _declared_sizes(backbone.model, kwargs), size)
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if right is None:
            raise ValueError(
                f"backbone.name={name}: patch_embed fails on an image of backbone.image_size={size} ({reason}); "
                "give the side that the model was made for, if that is why"
            ) from error
        advice = f"it takes backbone.image_size={right}, or kwargs that make it for {size}"
        raise ValueError(f"{wrong}: {advice} ({reason})") from error
    is_tensor = isinstance(tokens, Tensor)
    right_shape = is_tensor and tokens.ndim == 3 and tokens.shape[::2] == (1, backbone.embed_dim)
    if not (right_shape or (is_tensor and backbone.is_timms)):
        made = tuple(tokens.shape) if is_tensor else f"a {type(tokens).__name__}"
        raise ValueError(
            f"backbone.name={name}: patch_embed must make tokens (B, T, embed_dim) of images, here "
            f"(1, T, {backbone.embed_dim}); it makes {made}"
        )
    if unseen := _unseen(patches, size, tokens):
        raise ValueError(
            f"{wrong}: its patches do not reach the last {unseen} of {size} pixels; give a multiple of the patch, such "
            f"as backbone.image_size={size - unseen}"
        )


def _on_cpu(patches: Patches) -> Patches:
    """The module itself, or a copy with random weights where it has none."""
    if not isinstance(patches, nn.Module) or not any(
        tensor.is_meta for tensor in (*patches.parameters(), *patches.buffers())
    ):
        return patches
    rng = torch.Generator().manual_seed(0)
    filled = copy.deepcopy(patches).to_empty(device="cpu")
    for parameter in filled.parameters():
        parameter.copy_(_TRIAL_SCALE * torch.randn(parameter.shape, generator=rng))
    for buffer in filled.buffers():
        buffer.zero_()
    return filled


def _tokens(patches: Patches, images: Tensor) -> Tensor:
    """The tokens of images; some models return the shape of the grid of patches with them."""
    found = patches(images)
    tokens: Tensor = found[0] if isinstance(found, tuple | list) and found else found
    return tokens


def _unseen(patches: Patches, size: int, blank: Tensor) -> int:
    """Rows of pixels at the lower edge that change no token."""
    for unseen in range(min(_LARGEST_PATCH, size)):
        image = torch.zeros(1, 3, size, size)
        image[:, :, size - 1 - unseen] = 1
        if not torch.equal(_tokens(patches, image), blank):
            return unseen
    return 0


def _declared_sizes(model: nn.Module, kwargs: Mapping[str, Any]) -> Iterable[int]:
    """The sizes in the arguments of a model, and in its attributes."""
    of_parts = [getattr(part, "img_size", None) for part in (model, model.patch_embed)]
    for size in (kwargs.get("image_size"), kwargs.get("img_size"), *of_parts):
        side = size[0] if isinstance(size, tuple | list) and size else size
        if isinstance(side, int):
            yield side


def _accepted_size(patches: Patches, sizes: Iterable[int], refused: int) -> int | None:
    """The first of the sizes, but the refused one, that the patches take; else None."""
    for size in sizes:
        try:
            patches(torch.zeros(1, 3, size, size))
        except Exception:  # a user's module may raise anything
            continue
        if size != refused:
            return size
    return None
