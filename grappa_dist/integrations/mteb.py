"""A model as an encoder of mteb, so that the image retrieval tasks of MIEB run on it.

mteb is imported where it is needed, not when this module is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from grappa_dist import extras
from grappa_dist.export import Transform
from grappa_dist.models.spec import preprocess_of
from grappa_dist.retrieval.opening import Named, open_model

if TYPE_CHECKING:
    from mteb.models import ModelMeta


class Encoder:
    """What `mteb.evaluate` takes as a model: images -> unit embeddings; it embeds no text.

    Args:
        model: a run directory, an exported model's, `timm:<model>`, `<module>:<function>`, or what `load_model` gives.
        revision: of the model, for mteb's results; by default the beginning of the hash of its weights.
        device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:<number>"; None: "auto".
        how: `gallery`, `settings` and `trust_modules`, as for `retrieval.opening.open_model`.

    Raises:
        ValueError: there is no such model or device, or mteb is not installed.
    """

    def __init__(self, model: Named, revision: str | None = None, *, device: str | None = None, **how: Any) -> None:
        extras.require("mteb", what="grappa_dist.integrations.mteb")
        self.opened = open_model(model, device or "auto", **how)
        self.revision = revision or self.opened.sha256[:12]
        self.transform = Transform(preprocess_of(self.opened.model))

    @property
    def embed_dim(self) -> int:
        """D."""
        return int(self.opened.model.embed_dim)  # type: ignore[arg-type]

    @cached_property
    def mteb_model_meta(self) -> ModelMeta:
        """What mteb's results say of the model."""
        from mteb.models.model_meta import ModelMeta, ScoringFunction

        about = {
            "name": f"grappa_dist/{self.opened.variant}",
            "revision": self.revision,
            "embed_dim": self.embed_dim,
            "n_parameters": sum(p.numel() for p in self.opened.model.parameters()),
            "similarity_fn_name": ScoringFunction.COSINE,
            "framework": ["PyTorch"],
            "modalities": ["image"],
        }
        return ModelMeta.create_empty(overwrites=about)

    def encode(
        self, inputs: Iterable[Mapping[str, Any]], *, task_metadata: Any, prompt_type: Any = None, **others: Any
    ) -> NDArray[np.float32]:
        """Unit embeddings (n, D) of the images of all batches.

        Args:
            inputs: batches with PIL images under `image`.
            others: what mteb says of the split, and arguments of encoders of text; they change nothing.

        Raises:
            ValueError: the task has inputs that are no images.
        """
        kinds = list(task_metadata.get_modalities(prompt_type))
        if kinds != ["image"]:
            raise ValueError(f"{task_metadata.name}: has {' and '.join(kinds)}; expected a task of images alone")
        found = [self._embed(batch["image"]) for batch in inputs]
        return np.concatenate(found) if found else np.empty((0, self.embed_dim), np.float32)

    @torch.inference_mode()
    def _embed(self, images: Iterable[Image.Image]) -> NDArray[np.float32]:
        pixels = torch.stack([self.transform(image) for image in images]).to(self.opened.device)
        z = self.opened.model(pixels)
        return F.normalize(z, dim=1).cpu().numpy()

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosines of all pairs, (n, m)."""
        one, two = (F.normalize(torch.as_tensor(rows).float(), dim=-1) for rows in (embeddings1, embeddings2))
        return torch.atleast_2d(one) @ torch.atleast_2d(two).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosines of rows of the same place, (n,)."""
        return F.cosine_similarity(torch.as_tensor(embeddings1).float(), torch.as_tensor(embeddings2).float(), dim=-1)
