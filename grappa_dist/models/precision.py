"""The precision of a model: everything in float32, or matrix products in bfloat16, on any device alike.

With bf16 the weights of the frozen backbone's linear layers and convolutions are held in bfloat16, and products are
computed in it by autocast: those of the frozen layers, of attention and of adaptors. In float32 stay the tokens from
block to block, norms, the softmax over adaptor sets, losses, and whatever is learned: weights, their gradients and the
optimizer's state.

On a CPU attention is float32 as well where it takes part in gradients: its backward pass in bfloat16 takes 2 to 6 times
as long as in float32 (docs/experiments.md), while all other products gain. This holds on every CPU, as what is computed
in which type is part of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from grappa_dist.search.candidates import SharedSetting, true_products

Precision = Literal["fp32", "bf16"]
_cudnn: Any = torch.backends.cudnn
_convolutions = SharedSetting(lambda: _cudnn.allow_tf32, lambda allowed: setattr(_cudnn, "allow_tf32", allowed), False)
_PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def hold_weights(model: nn.Module, precision: Precision) -> None:
    """Gives the frozen weights of linear layers and convolutions the type of their products; others stay as they are.

    From bf16 to fp32 numbers stay those of bfloat16. Tensors on the device meta are left alone.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for module in model.modules():
        for parameter in module.parameters(recurse=False) if isinstance(module, _PRODUCTS) else ():
            if not (parameter.requires_grad or parameter.is_meta) and parameter.dtype != torch.float64:
                parameter.data = parameter.data.to(dtype)


def products_in(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """A forward pass in this precision, as a context; nothing on the device meta, where nothing is computed."""
    if device.type == "meta":
        return nullcontext()
    return _all_in_float32(device) if precision == "fp32" else _products_in_bfloat16(device)


def computed_again_alike(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For torch's checkpoint, which goes back to the autocast of the forward pass, and to nothing else of it."""
    if not torch.is_autocast_enabled("cpu"):
        return run

    def again(*args: Any, **kwargs: Any) -> Tensor:
        with _AttentionInFloat32():
            return run(*args, **kwargs)

    return again


@contextmanager
def _products_in_bfloat16(device: torch.device) -> Iterator[None]:
    with torch.autocast(device.type, torch.bfloat16), _AttentionInFloat32() if device.type == "cpu" else nullcontext():
        yield


@contextmanager
def _all_in_float32(device: torch.device) -> Iterator[None]:
    """Also within an autocast, and on a GPU without TF32, which convolutions and, if the process allows it, products
    would else round to."""
    with ExitStack() as held:
        if device.type == "cuda":
            held.enter_context(true_products())
            held.enter_context(_convolutions.held())
        if torch.is_autocast_enabled(device.type):
            held.enter_context(torch.autocast(device.type, enabled=False))
        yield


class _AttentionInFloat32(TorchFunctionMode):
    """While active, torch's attention computes in float32 where it takes part in gradients; the result is rounded."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        given = [*args, *kwargs.values()]
        if not any(isinstance(t, Tensor) and t.requires_grad for t in given):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            out: Tensor = func(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()})
        return out.bfloat16()


def _widened(value: Any) -> Any:
    """A tensor of bfloat16 in float32; anything else as it is, such as a mask of booleans."""
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
