"""A pretend GPU: tensors that say cuda:0, compute on the CPU, and refuse what CUDA refuses; what they do is counted.

`CudaTensor` holds a tensor of the CPU. Every operation of torch passes through `run`, below autograd and autocast,
which so are the real ones of CUDA; DeepSpeed takes its CUDA accelerator. Refused are tensors of two devices, a
generator of the CPU, integer products, `numpy()`, attention of no image, and under "nccl" any tensor of the CPU;
streams.py refuses what streams forbid.

It changes torch for good: it is imported in a process of its own (tests/gpu/process.py), after `guard.install` and
before the package.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.cuda.nccl
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from tests.gpu import streams
from tests.gpu.counting import LIMITS, add, add_number, in_background, is_counting, where

CUDA = torch.device("cuda", 0)
MEMORY = 80 * 2**30
WAITING = {  # operations whose result decides how much memory the host takes, or what it does next
    "aten._local_scalar_dense": "item",
    "aten.is_nonzero": "bool",
    "aten.equal": "equal",
    "aten.nonzero": "nonzero",
    "aten.masked_select": "masked_select",
    "aten.bincount": "bincount",
    "aten._unique2": "unique",
    "aten.unique_consecutive": "unique_consecutive",
    "aten.unique_dim": "unique_dim",
    "aten.repeat_interleave": "repeat_interleave",
    "aten._linalg_eigh": "eigh",
    "aten._linalg_svd": "svd",
    "aten.histc": "histc",
}
HOST_RESULTS = {"aten._local_scalar_dense", "aten.is_nonzero", "aten.equal"}
NO_KERNEL = {  # beside views
    *HOST_RESULTS,
    "aten.empty",
    "aten.empty_like",
    "aten.empty_strided",
    "aten.new_empty",
    "aten.new_empty_strided",
    "aten._unsafe_view",
    "aten.resize_",
}
INDEXING = {"aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_", "aten._unsafe_index"}
PRODUCTS = {"aten.mm", "aten.bmm", "aten.addmm", "aten.baddbmm", "aten.addmv", "aten.mv", "aten.dot"}
_backend = ""  # of the process group, as the program sees it
_computes_products = True


class CudaTensor(torch.Tensor):
    """A tensor that says cuda:0. `elements` is the tensor of the CPU that has its values."""

    elements: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, elements: Tensor) -> CudaTensor:
        made: CudaTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            elements.size(),
            strides=elements.stride(),
            storage_offset=elements.storage_offset(),
            dtype=elements.dtype,
            layout=elements.layout,
            device=CUDA,
        )
        made.elements = elements
        return made

    def __init__(self, elements: Tensor) -> None: ...

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"CudaTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to host memory")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def data_ptr(self) -> int:
        return self.elements.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.elements.untyped_storage()

    def tolist(self) -> Any:
        add("waits", "tolist")
        add("copies", "to the host")
        add_number("bytes_to_host", self.elements.nbytes)
        return _elements(self, wait=True).tolist()

    def pin_memory(self, *args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError(f"cannot pin 'torch.cuda.{self.dtype}' only dense CPU tensors can be pinned")

    def is_pinned(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def record_stream(self, stream: Any) -> None:
        """Memory here is never given to another stream."""

    def __getitem__(self, index: Any) -> Tensor:
        return torch.Tensor.__getitem__(self, _index(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        torch.Tensor.__setitem__(self, _index(index), value)

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=CUDA, **kwargs)


def _elements(tensor: Tensor, *, wait: bool = False) -> Tensor:
    """The CPU's tensor of one of the device, once what is to be written to it is there."""
    if not isinstance(tensor, CudaTensor):
        streams.check_arrived(tensor)
        return tensor
    streams.used(tensor.elements)
    if wait:
        streams.host_waits_for_current()
    return tensor.elements


def _index(index: Any) -> Any:
    """Lists, which torch copies to the device."""
    if isinstance(index, tuple):
        return tuple(_index(one) for one in index)
    if isinstance(index, list):
        return torch.tensor(index, dtype=None if index else torch.int64, device=CUDA)
    return index


def _wrap(value: Any) -> Any:
    return CudaTensor(value) if isinstance(value, Tensor) and not isinstance(value, CudaTensor) else value


@functools.cache
def _name(func: Any) -> str:
    return str(func._schema.name.replace("::", "."))


@functools.cache
def _is_view(func: Any) -> bool:
    """Whether the result is another look at an argument."""
    returned = [r.alias_info for r in func._schema.returns]
    return bool(returned) and all(alias is not None and not alias.is_write for alias in returned)


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, on the device if an argument is there or the result is to be."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    device = kwargs.get("device")
    asked = "" if device is None else torch.device(device).type
    name = _name(func)
    if name.startswith("c10d."):
        return _collective(func, args, kwargs, tensors)
    on_device = any(isinstance(tensor, CudaTensor) for tensor in tensors)
    if not on_device and asked != "cuda":
        return _on_host(func, args, kwargs, tensors)
    if (
        name in ("aten._to_copy", "aten.copy_", "aten._pin_memory")
        and (copied := _copy(name, args, kwargs)) is not None
    ):
        return copied
    _refuse(name, args, kwargs, tensors)
    return _compute(func, args, kwargs, to_host=asked == "cpu", made=not on_device)


def _on_host(func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
    for tensor in tensors:
        streams.check_arrived(tensor)
    pinned = kwargs.pop("pin_memory", False)
    made = func(*args, **kwargs)
    return streams.pin(made) if pinned else made


def _refuse(name: str, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
    """Raises RuntimeError for what CUDA refuses."""
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Generator) and leaf.device.type == "cpu":
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' [{name} {where()}]")
    if name in PRODUCTS and not tensors[-1].is_floating_point():
        raise RuntimeError(f'"addmm_cuda" not implemented for {tensors[-1].dtype} [{name} {where()}]')
    if "flash_attention" in name and any(tensor.shape[0] == 0 for tensor in tensors[:1]):
        raise RuntimeError(f"batch size must be positive [{name} {where()}]")
    others = [tensor for tensor in tensors if not isinstance(tensor, CudaTensor)]
    if name in INDEXING and isinstance(args[0], CudaTensor):  # which copies indices to the device
        indices = [index for index in args[1] if index is not None]
        for _ in [index for index in indices if not isinstance(index, CudaTensor)]:
            add("waits", "index on the host")
            add("copies", "to the device")
        others = [tensor for tensor in others if not any(tensor is index for index in indices)]
    if wrong := [tensor for tensor in others if tensor.dim()]:
        shapes = [tuple(tensor.shape) for tensor in wrong]
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"[{name} of {shapes} {where()}]"
        )


def _masks_in(name: str, args: Any) -> bool:
    """Whether an index is a mask whose places are counted first; one value into a mask is written without."""
    if name not in INDEXING or not any(
        isinstance(index, CudaTensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    ):
        return False
    value = args[2] if len(args) > 2 else None
    return not (isinstance(value, Tensor) and not isinstance(value, CudaTensor) and value.numel() == 1)


def _compute(func: Any, args: Any, kwargs: dict[str, Any], *, to_host: bool, made: bool) -> Any:
    """Any operation but copies between host and device."""
    name = _name(func)
    if name in WAITING and not (name == "aten.repeat_interleave" and kwargs.get("output_size") is not None):
        add("waits", WAITING[name])
        streams.host_waits_for_current()
    if _masks_in(name, args):
        add("waits", "mask as an index")
        streams.host_waits_for_current()
    given = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
    if kwargs.get("device") is not None:
        given["device"] = torch.device("cpu")
    plain, given = tree_map(lambda x: _elements(x) if isinstance(x, Tensor) else x, (args, given))
    computed = _INSTEAD.get(name, func)
    found = _zeros_of(computed, plain, given) if _only_shapes(func) else computed(*plain, **given)
    if name in HOST_RESULTS or to_host:
        return found
    if not _is_view(func) and name not in NO_KERNEL:
        _count(func, (plain, given), found)
    for leaf in tree_leaves(found):
        if isinstance(leaf, Tensor) and not _is_view(func):
            streams.wrote(leaf)
    found = tree_map(_wrap, found)
    return found if made else return_and_correct_aliasing(func, args, kwargs, found)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, *rest: Any, **scale: Any
) -> Any:
    """CUDA's flash attention by the CPU's: (output, log sums), and what only CUDA returns."""
    aten, none = torch.ops.aten, torch.empty(0, dtype=torch.int64)
    out, log_sums = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, causal, **scale)
    return out, log_sums, none, none.clone(), q.shape[2], k.shape[2], none.clone(), none.clone(), none.clone()


def _flash_backward(*given: Any, **scale: Any) -> Any:
    grad, q, k, v, out, log_sums, _, _, _, _, dropout, causal, *_ = given
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(grad, q, k, v, out, log_sums, dropout, causal, **scale)


def _efficient(q: Tensor, k: Tensor, v: Tensor, bias: Any, log_sums: bool, *rest: Any, **scale: Any) -> Any:
    """CUDA's attention for what flash attention does not take, such as float32."""
    found = _flash(q, k, v, *rest, **scale)
    return found[0], found[1], torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)


def _efficient_backward(*given: Any, **scale: Any) -> Any:
    grad, q, k, v, _, out, log_sums, _, _, dropout, _, causal = (*given, False)[:12]
    found = _flash_backward(grad, q, k, v, out, log_sums, 0, 0, 0, 0, dropout, causal, **scale)
    return *found, None


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, *rest: Any, **more: Any) -> Tensor:
    """`scaled_dot_product_attention` by the kernel that CUDA would take, which a build for CPUs does not ask for."""
    scale = more.get("scale")
    special = any(more.get(name) for name in ("dropout_p", "is_causal", "enable_gqa"))
    if not isinstance(q, CudaTensor) or attn_mask is not None or rest or special or q.dim() != 4:
        return _plain_attention(q, k, v, attn_mask, *rest, **more)
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (one.to(torch.get_autocast_dtype("cuda")) for one in (q, k, v))
    aten = torch.ops.aten
    if q.dtype in (torch.bfloat16, torch.float16):
        return aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]  # type: ignore[no-any-return]
    grad = torch.is_grad_enabled() and any(one.requires_grad for one in (q, k, v))
    return aten._scaled_dot_product_efficient_attention(q, k, v, None, grad, scale=scale)[0]  # type: ignore[no-any-return]


_INSTEAD = {
    "aten._scaled_dot_product_flash_attention": _flash,
    "aten._scaled_dot_product_flash_attention_backward": _flash_backward,
    "aten._scaled_dot_product_efficient_attention": _efficient,
    "aten._scaled_dot_product_efficient_attention_backward": _efficient_backward,
}


@contextlib.contextmanager
def without_products() -> Iterator[None]:
    """Products, convolutions and attention are zeros inside. What is counted depends on their shapes alone, and on a
    CPU they take nearly all the time of a large model."""
    global _computes_products
    _computes_products = False
    try:
        yield
    finally:
        _computes_products = True


def _only_shapes(func: Any) -> bool:
    return not _computes_products and func._overloadpacket in flop_registry


def _zeros_of(computed: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation would return, of the same shapes and strides, and zero."""

    def shape_of(leaf: Any) -> Any:
        return leaf.to("meta") if isinstance(leaf, Tensor) else leaf

    def zeros(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.device.type != "meta":
            return leaf
        return torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device="cpu").zero_()

    args, kwargs = tree_map(shape_of, (args, kwargs))
    return tree_map(zeros, computed(*args, **kwargs))


def _count(func: Any, given: Any, found: Any) -> None:
    if is_counting():
        add("operations", _name(func))
        tensors = [leaf for leaf in (*tree_leaves(given), *tree_leaves(found)) if isinstance(leaf, Tensor)]
        moved = sum(tensor.nbytes for tensor in tensors)
        formula = flop_registry.get(func._overloadpacket)
        flops = int(formula(*given[0], **given[1], out_val=found)) if formula is not None else 0
        dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
        add_number("bytes_moved", moved)
        add_number("flops", flops)
        add_number("limit_s", LIMITS.seconds(dtype, flops, moved))


def _copy(name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """A copy between host and device; None for what is none."""
    if name == "aten.copy_":
        target, source = args[:2]
        waits_not = bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking"))
        to_device = isinstance(target, CudaTensor)
        if to_device == isinstance(source, CudaTensor):
            return None
        _transfer(source, target.elements if to_device else target, to_device=to_device, waits_not=waits_not)
        return target
    if name != "aten._to_copy":
        return None
    source, asked = args[0], kwargs.get("device")
    to_device = asked is None or torch.device(asked).type == "cuda"
    if to_device == isinstance(source, CudaTensor):
        return None
    plain = source.elements if isinstance(source, CudaTensor) else source
    target = torch.empty_like(plain, dtype=kwargs.get("dtype") or plain.dtype)
    waits_not = bool(kwargs.get("non_blocking"))
    if waits_not and not to_device:
        streams.pin(target)  # as torch does
    _transfer(source, target, to_device=to_device, waits_not=waits_not)
    return CudaTensor(target) if to_device else target


def _transfer(source: Tensor, target: Tensor, *, to_device: bool, waits_not: bool) -> None:
    """Copies between host and device; later, where the host does not wait."""
    if not source.numel():
        return
    add("copies", "to the device" if to_device else "to the host")
    add_number("bytes_to_device" if to_device else "bytes_to_host", source.nbytes)
    if not to_device:
        source = _elements(source)
    else:
        streams.check_arrived(source)
    if waits_not and streams.is_pinned(source if to_device else target):
        # What is on the device changes in its order; what is on the host changes when the host likes.
        given = source if to_device else source.clone()
        streams.later(lambda: target.copy_(given), target, on_host=not to_device)
        return
    add("waits", "copy to the device" if to_device else "copy to the host")
    streams.host_waits_for_current()
    target.copy_(source)
    if to_device:
        streams.wrote(target)


def _collective(func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
    """By gloo. Under "nccl" the host goes on, and a tensor of the CPU is refused."""
    name = _name(func).removeprefix("c10d.")
    if _backend == "nccl" and "barrier" not in name:
        if any(not isinstance(tensor, CudaTensor) for tensor in tensors):
            raise RuntimeError(f"No backend type associated with device type cpu [{name} {where()}]")
        add("collectives", name)
    if "barrier" in name:
        add("waits", "barrier")
    plain = tree_map(lambda x: _elements(x) if isinstance(x, Tensor) else x, (args, kwargs))
    found = func(*plain[0], **plain[1])
    for tensor in tensors:
        if isinstance(tensor, CudaTensor):
            streams.wrote(tensor.elements)
    return tree_map(_wrap, found) if tensors and isinstance(tensors[0], CudaTensor) else found


class _Mode(TorchDispatchMode):
    """Sends operations without a tensor of the device, such as `torch.zeros(..., device="cuda")`, through `run`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, dict(kwargs or {}))


_tensor, _numpy, _list = torch.tensor, torch.Tensor.numpy, torch.Tensor.tolist
_init, _start = dist.init_process_group, threading.Thread._bootstrap_inner  # type: ignore[attr-defined]
_to, _plain_attention = torch.nn.Module.to, F.scaled_dot_product_attention


def _tensor_on_device(data: Any, **kwargs: Any) -> Tensor:
    """`torch.tensor`, which copies from the host."""
    device = kwargs.pop("device", None)
    made = _tensor(data, **kwargs)
    return made if device is None else made.to(device)


def _pinned(tensor: Tensor, device: Any = None) -> Tensor:
    return tensor if streams.is_pinned(tensor) else streams.pin(tensor.clone())


def _arrived(method: Any) -> Any:
    """A method that reads a tensor of the host past torch's operations."""

    @functools.wraps(method)
    def checked(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        streams.check_arrived(tensor)
        return method(tensor, *args, **kwargs)

    return checked


def _module_to(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """`Module.to`, which keeps the parameters that are on the device already."""
    tensors = [*module.parameters(), *module.buffers()]
    device = args[0] if args else kwargs.get("device")
    there = tensors and all(isinstance(tensor, CudaTensor) for tensor in tensors)
    if there and isinstance(device, str | torch.device) and torch.device(device).type == "cuda" and len(args) < 2:
        return module
    return _to(module, *args, **kwargs)


def _init_by_gloo(backend: str | None = None, *args: Any, device_id: Any = None, **kwargs: Any) -> None:
    _init("gloo", *args, **kwargs)


def _thread_on_device(thread: threading.Thread) -> None:
    """A thread of Python: modes are each thread's own."""
    in_background()
    with _Mode():
        _start(thread)


def _of_cuda() -> dict[str, Any]:
    """What torch.cuda has of a GPU: one, of 80 GiB, all of which is free."""
    properties = SimpleNamespace(
        major=9, minor=0, name="NVIDIA H200", total_memory=MEMORY, multi_processor_count=132, warp_size=32
    )
    found: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *args: properties.name,
        "get_device_properties": lambda *args: properties,
        "get_device_capability": lambda *args: (9, 0),
        "is_bf16_supported": lambda *args, **kwargs: True,
        "mem_get_info": lambda *args: (MEMORY, MEMORY),
        "memory_stats": lambda *args: {},
        "Stream": streams.Stream,
        "Event": streams.Event,
        "current_stream": streams.current_stream,
        "default_stream": lambda *args: streams.DEFAULT,
        "set_stream": streams.set_stream,
        "stream": lambda stream: stream if stream is not None else contextlib.nullcontext(),
        "synchronize": streams.synchronize,
    }
    nothing = ("set_device", "init", "empty_cache", "reset_peak_memory_stats", "ipc_collect")
    found |= {name: lambda *args, **kwargs: None for name in nothing}
    none = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
    return found | {name: lambda *args, **kwargs: 0 for name in none}


def _for_good() -> None:
    """What must be so before the package is imported."""
    from grappa_dist._compat import declare_torchvision_ops

    declare_torchvision_ops()  # of a torch without CUDA, which this one will no longer seem to be
    import torchvision  # noqa: F401

    torch.version.cuda = "13.0"
    torch.cuda.nccl.version = lambda: (2, 29, 0)  # type: ignore[assignment]
    torch.inference_mode = lambda *args, **kwargs: torch.no_grad()  # type: ignore[assignment,misc]
    torch.__future__.set_overwrite_module_params_on_conversion(True)


@contextlib.contextmanager
def pretend(backend: str = "") -> Iterator[None]:
    """The machine has a GPU inside. `backend` is what process groups, which are gloo's, say that they are."""
    import torch.cuda.amp.common as amp
    import torch.cuda.nvtx as nvtx

    global _backend
    changes: list[tuple[Any, str, Any]] = [(torch.cuda, name, value) for name, value in _of_cuda().items()]
    changes += [(nvtx, name, lambda *args: 0) for name in ("range_push", "range_pop")]
    changes += [
        (amp, "amp_definitely_not_available", lambda: False),
        (torch, "tensor", _tensor_on_device),
        (torch.Tensor, "pin_memory", _pinned),
        (torch.Tensor, "is_pinned", lambda tensor, device=None: streams.is_pinned(tensor)),
        (torch.Tensor, "numpy", _arrived(_numpy)),
        (torch.Tensor, "tolist", _arrived(_list)),
        (torch.nn.Module, "to", _module_to),
        (F, "scaled_dot_product_attention", _attention),
        (threading.Thread, "_bootstrap_inner", _thread_on_device),
        (dist, "init_process_group", _init_by_gloo),
    ]
    if backend:
        changes.append((dist, "get_backend", lambda *args, **kwargs: backend))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    _backend = backend
    try:
        with _Mode():
            yield
    finally:
        _backend = ""
        for owner, name, value in before:
            setattr(owner, name, value)


_for_good()
