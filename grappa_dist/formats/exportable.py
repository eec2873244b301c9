"""The model as one graph, RGB in [0, 1] -> unit embeddings, with a free batch size; and `torch.export` files of it.

Shapes: B images, S pixels a side, L layers, N adaptor sets, D channels.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from grappa_dist.data.transforms import Preprocess
from grappa_dist.export import RetrievalModel
from grappa_dist.functions import describe_raised

Dtype = Literal["fp32", "fp16", "bf16"]
DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
METADATA = "grappa_dist.json"  # a file in the archive: torch.export.load(path, extra_files={"grappa_dist.json": ""})
INPUT, EMBEDDINGS, WEIGHTS = "images", "embeddings", "weights"  # names of the graph's input and outputs


class Exportable(nn.Module):
    """A model in the numbers that are stored: RGB in [0, 1] (B, 3, S, S) float32 -> (B, D) unit rows, float32.

    Where the model attends to its adaptor sets, their weights (B, L, N) are a second output. Images are normalised and
    embeddings made unit in float32, in whatever type the layers between compute.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: RetrievalModel, dtype: Dtype = "fp32", *, computes: Dtype | None = None) -> None:
        """
        Args:
            dtype: the type that weights are rounded to.
            computes: the type that layers compute in; None: the same.
        """
        super().__init__()
        self.dtype, self.size = DTYPES[computes or dtype], model.transform.preprocess.image_size
        self.grappa = model.grappa
        if dtype != "fp32":
            self.grappa = copy.deepcopy(model.grappa).to(DTYPES[dtype]).to(self.dtype)
        self.has_weights = any(layer.wide is None for layer in self.grappa.layers)
        self.register_buffer("mean", model.grappa.backbone.mean.clone())
        self.register_buffer("std", model.grappa.backbone.std.clone())

    @property
    def outputs(self) -> list[str]:
        return [EMBEDDINGS, WEIGHTS] if self.has_weights else [EMBEDDINGS]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        pixels = ((images - self.mean) / self.std).to(self.dtype)
        z = F.normalize(self.grappa.backbone.features(pixels).float(), dim=1)
        weights = (self.grappa.last_attention().float(),) if self.has_weights else ()
        for layer in self.grappa.layers:
            layer.alpha = None  # of this forward; an exporter refuses a module that keeps a result
        return z, *weights


def trace(model: Exportable, backbone: str) -> ExportedProgram:
    """The graph of a model, its batch size free.

    Args:
        backbone: its name, for messages.

    Raises:
        ValueError: torch.export cannot follow the backbone's code, or it works for one batch size alone.
    """
    example = torch.rand(2, 3, model.size, model.size, generator=torch.Generator().manual_seed(0))
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # an operator of torch.nn's encoder layers that no format has
    try:
        with quiet(), torch.no_grad():
            traced = torch.export.export(model, (example,), dynamic_shapes=({0: Dim("batch", min=1)},), strict=False)
    except Exception as error:  # a user's module may raise anything, and torch.export has errors of many kinds
        raise ValueError(f"{backbone}: torch.export cannot follow this backbone: {describe_raised(error)}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    for node in traced.graph.nodes:
        for private in ("stack_trace", "source_fn_stack"):  # with the paths of this machine
            node.meta.pop(private, None)
    return traced


def write(traced: ExportedProgram, path: Path, about: Mapping[str, Any]) -> None:
    """Writes a .pt2 file, which torch alone loads; `about` is kept in it as METADATA."""
    traced._example_inputs = None  # they would be the one pickle in the archive
    with quiet(), path.open("wb") as file:
        torch.export.save(traced, file, extra_files={METADATA: json.dumps(about, indent=1)})


def read(path: Path) -> Callable[[Tensor], Tensor]:
    """The embeddings of images by a .pt2 file that was just written, (B, 3, S, S) -> (B, D)."""
    with quiet():
        module = torch.export.load(path).module()

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = module(images)[0]
        return found

    return run


@contextmanager
def quiet() -> Iterator[None]:
    """Without the remarks of exporters on their own progress; what they made is checked by its results."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def describe_interface(model: Exportable, embed_dim: int) -> dict[str, Any]:
    """Names, shapes and meaning of the input and the outputs, for a reader of the file's metadata."""
    layers, sets = len(model.grappa.layers), model.grappa.num_sets
    outputs = [{"name": EMBEDDINGS, "shape": ["batch", embed_dim], "dtype": "float32", "meaning": "unit rows"}]
    if model.has_weights:
        meaning = "weights of the adaptor sets in each layer, which sum to one"
        outputs.append({"name": WEIGHTS, "shape": ["batch", layers, sets], "dtype": "float32", "meaning": meaning})
    shape = ["batch", 3, model.size, model.size]
    meaning = "RGB in [0, 1], resized and cropped as `preprocess` says; normalised inside"
    return {"input": {"name": INPUT, "shape": shape, "dtype": "float32", "meaning": meaning}, "outputs": outputs}


def describe_preprocess(preprocess: Preprocess) -> dict[str, Any]:
    """How an image file becomes the input: the settings, and the steps."""
    side, share = preprocess.image_size, preprocess.crop_share
    resize = f"resize to {side} x {side}, {preprocess.interpolation} with antialiasing"
    crop = [resize]
    if preprocess.resize == "crop":
        shorter = int(side / share)
        crop = [
            f"resize so that the shorter side is {shorter}, {preprocess.interpolation} with antialiasing",
            f"take the centre, {side} x {side}",
        ]
    steps = ["decode, turn upright by the EXIF orientation, convert to RGB", *crop, "divide by 255"]
    return {**asdict(preprocess), "steps": steps, "normalised": "inside of the graph, by mean and std"}
