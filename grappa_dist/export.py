"""The adapted model as one directory, and back. Shapes: B images, S pixels a side, L layers, N sets, D channels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from grappa_dist.artifacts import Artifact
from grappa_dist.data.decoding import to_rgb, upright
from grappa_dist.files import replacing, write_json
from grappa_dist.models import Grappa
from grappa_dist.models.spec import CONFIG_FILE, FORMAT, WEIGHTS_FILE, ModelSpec, build, load_grappa, preprocess_of
from grappa_dist.ops.galleries import set_weights, transitivity
from grappa_dist.stages.gallery_weights import load_galleries


class RetrievalModel(nn.Module):
    """Images to unit embeddings; frozen.

    `transform` is the exact test transform (PIL image -> (3, S, S) in [0, 1]); normalisation happens inside the model.
    Weights are folded for speed, which changes results by rounding alone; `grappa` holds them as they were trained.
    `galleries` has the weights (N,) of the sets for each task of the run, where the variant is `gallery`: such a model
    is the average of its sets until `weigh(galleries[task])`, or `condition`, says which gallery is searched.
    """

    def __init__(self, grappa: Grappa, sets: list[str], galleries: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.grappa, self.sets = grappa.requires_grad_(False).eval(), sets
        self.galleries = dict(galleries or {})
        self.grappa.fold()
        preprocess = preprocess_of(grappa.backbone.pixels)

        def transform(image: Image.Image) -> Tensor:
            return torch.from_numpy(preprocess.test(to_rgb(upright(image)))).permute(2, 0, 1).float() / 255

        self.transform: Callable[[Image.Image], Tensor] = transform

    @property
    def embed_dim(self) -> int:
        return self.grappa.embed_dim

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """RGB in [0, 1], (B, 3, S, S) -> (B, D) unit rows."""
        return F.normalize(self.grappa(images).float(), dim=1)

    @torch.no_grad()
    def attention(self, images: Tensor) -> Tensor:
        """How each layer weighs the adaptor sets for each image, (B, L, N); `sets` names them."""
        self.grappa(images)
        return self.grappa.last_attention()

    @torch.no_grad()
    def condition(self, gallery: Iterable[Tensor]) -> Tensor:
        """Weighs the adaptor sets by the images that will be searched, from now on; the weights (N,), as `sets`.

        Every image is embedded by each set alone, and the sets in whose features neighbours of neighbours are
        neighbours gain weight (ops/galleries.py). Embed queries and gallery after it, and anew whenever it was called.
        A learned attention is multiplied by the weights.

        Args:
            gallery: batches of images, RGB in [0, 1], (b, 3, S, S) each; a sample of some thousands will do.

        Raises:
            ValueError: the gallery has less than three images, which have no structure.
        """
        features: list[list[Tensor]] = [[] for _ in self.sets]
        try:
            for images in gallery:
                for found, alone in zip(features, torch.eye(len(self.sets)), strict=True):
                    self.weigh(alone)
                    found.append(self(images))
        finally:
            self.weigh(None)
        count = sum(map(len, features[0]))
        if count < 3:
            raise ValueError(f"condition: the gallery has {count} images, it needs three at least")
        weights = set_weights(torch.stack([transitivity(torch.cat(z)).cpu() for z in features]))
        self.weigh(weights)
        return weights

    def weigh(self, weights: Tensor | None) -> None:
        """Weighs the adaptor sets as said, (N,), for all images alike; None: as exported."""
        self.grappa.weigh(weights)
        self.grappa.fold()


def export_model(spec: ModelSpec, artifact: Artifact) -> None:
    """Writes the model's weights, backbone included, and what is needed to build it again."""
    grappa = build(spec, torch.device("cpu"))
    assert isinstance(grappa, Grappa)
    folder = artifact.begin()
    with replacing(folder / WEIGHTS_FILE) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in grappa.state_dict().items()}, temporary)
    config = {
        "format": FORMAT,
        "variant": spec.name,
        "sets": spec.sets,
        "backbone": {"name": spec.backbone.name, "kwargs": spec.backbone.kwargs},
        "pixels": asdict(grappa.backbone.pixels),
        "bottleneck": spec.bottleneck,
        "attention": spec.attends,
    }
    if spec.galleries is not None:
        config["galleries"] = {task: found["weights"] for task, found in load_galleries(spec.galleries).items()}
    write_json(folder / CONFIG_FILE, config)
    artifact.commit()


def load_model(run_or_model_dir: str | Path) -> RetrievalModel:
    """The model of a run directory or of an exported model directory, on the CPU.

    A backbone called `module:function` needs that module importable.

    Raises:
        ValueError: the directory holds no model, or one of an unknown format.
    """
    grappa, config = load_grappa(Path(run_or_model_dir))
    galleries = {task: torch.tensor(weights) for task, weights in config.get("galleries", {}).items()}
    return RetrievalModel(grappa, config["sets"], galleries)
