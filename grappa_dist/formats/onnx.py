"""ONNX files: a model for onnxruntime and whatever else reads the format, weights inside, batch size free.

bfloat16 is a type of storage here: the graph casts weights to float32, as onnxruntime's CPU kernels know no other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from grappa_dist.extras import require
from grappa_dist.formats.exportable import EMBEDDINGS, INPUT, quiet
from grappa_dist.functions import describe_raised

OPSET = 20  # of ai.onnx: the first with GELU as an operator
MOST_BYTES = 2**31 - 2**24  # of weights in one file: protobuf ends at 2 GiB
_SMALL = 256  # numbers of a tensor, below which it stays as it is
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_possible(size: int, what: str) -> None:
    """Raises ValueError where a package is missing, or a model of so many bytes does not fit into one file."""
    require(*PACKAGES, what=what)
    if size > MOST_BYTES:
        raise ValueError(
            f"{what}: the weights have {size / 1e9:.1f} GB and an ONNX file ends at 2 GiB; "
            "expected --dtype fp16, or --to torch"
        )


def write(traced: ExportedProgram, path: Path, about: Mapping[str, Any], *, narrow: bool = False) -> None:
    """Writes the file; `about` becomes its metadata, a text of JSON for each entry that is no text.

    Args:
        about: as of `formats.convert`; names the outputs.
        narrow: whether weights, which are numbers of bfloat16, are stored as such.

    Raises:
        ValueError: the graph has an operator that ONNX has not.
    """
    try:
        with quiet():
            program = torch.onnx.export(
                traced,
                dynamo=True,
                input_names=[INPUT],
                output_names=[output["name"] for output in about["outputs"]],
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as error:  # of many kinds
        raise ValueError(f"{path.name}: torch.onnx.export: {describe_raised(error)}") from error
    assert program is not None
    model = program.model
    _name_batch(model)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # with the paths of this machine
    model.metadata_props.update({name: v if isinstance(v, str) else json.dumps(v) for name, v in about.items()})
    if narrow:
        _narrow(model)
    program.save(str(path), external_data=False)


def _name_batch(model: Any) -> None:
    """Calls the first axis of input and outputs `batch`, wherever the exporter's name for it stands."""
    import onnx_ir as ir

    own = str(model.graph.inputs[0].shape[0])
    values = [*model.graph.inputs, *(output for node in model.graph.all_nodes() for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            dims = [ir.SymbolicDim("batch") if str(d) == own else d for d in value.shape]
            value.shape = ir.Shape(dims)


def _narrow(model: Any) -> None:
    """Stores the large weights as bfloat16, each with a cast to float32 before its first use."""
    import ml_dtypes
    import onnx_ir as ir

    graph = model.graph
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor.dtype != ir.DataType.FLOAT or tensor.size < _SMALL:
            continue
        numbers = torch.from_numpy(tensor.numpy().copy()).bfloat16().contiguous().view(torch.int16).numpy()
        raw = ir.Tensor(numbers.view(ml_dtypes.bfloat16), dtype=ir.DataType.BFLOAT16, name=f"{name}.bf16")
        stored = ir.Value(name=raw.name, shape=value.shape, type=ir.TensorType(raw.dtype), const_value=raw)
        cast = ir.Node("", "Cast", [stored], [ir.AttrInt64("to", int(ir.DataType.FLOAT))])
        cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].type = name, value.shape, value.type
        value.replace_all_uses_with(cast.outputs[0])
        del graph.initializers[name]
        graph.register_initializer(stored)
        graph.insert_before(graph[0], cast)


def read(path: Path) -> Callable[[Tensor], Tensor]:
    """The embeddings of images by onnxruntime on the CPU, (B, 3, S, S) -> (B, D).

    Raises:
        ValueError: onnxruntime has no kernel for an operator in this type.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ValueError(f"{path.name}: onnxruntime cannot run it: {' '.join(str(error).split())[:300]}") from error

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([EMBEDDINGS], {INPUT: images.numpy()})[0])

    return run
