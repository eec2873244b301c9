"""A model as a transformer of scikit-learn: images in, unit embeddings out.

Shapes: n images, D channels, S pixels a side.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from grappa_dist.data.decoding import BadImage, Picture, open_picture, upright
from grappa_dist.data.transforms import Preprocess
from grappa_dist.extras import require
from grappa_dist.make_shards.sources import encoded
from grappa_dist.models.spec import preprocess_of
from grappa_dist.retrieval import BATCH_SIZE, DECODE_THREADS
from grappa_dist.retrieval.opening import Named, OpenModel, open_model
from grappa_dist.stages.embed import to_images

require("sklearn", what="grappa_dist.integrations.sklearn")
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin  # noqa: E402

_PIXELS = "(H, W), (H, W, 3) or (H, W, 4) of uint8"


class ImageEmbedder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Images to unit rows (n, D) float32, whose dot products are cosines; nothing is learned from what it is fitted on.

    X is a sequence of images, each a path, a PIL image or pixels of uint8; also an array (n, H, W, 3), a column of a
    data frame, or a frame of one column, as a ColumnTransformer passes it. The model is opened by `fit`, or by the
    first `transform`. A copy that is sent to another process opens it again there: no weights are pickled.

    Args:
        model: a run directory, that of an exported model, `timm:<model>`, `<module>:<function>`, or a model in memory.
        device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:<number>".
        batch_size: images at a time.
        threads: that read and decode them.
        gallery: of a model of the variant `gallery`, the task whose weights of the sets are used.
        settings: `backbone.key=value`, for a backbone that is named.
        trust_modules: as for `load_model`.
    """

    def __init__(
        self,
        model: Named,
        *,
        device: str = "auto",
        batch_size: int = BATCH_SIZE,
        threads: int = DECODE_THREADS,
        gallery: str | None = None,
        settings: Sequence[str] = (),
        trust_modules: bool | None = None,
    ) -> None:
        self.model = model
        self.device = device
        self.batch_size = batch_size
        self.threads = threads
        self.gallery = gallery
        self.settings = settings
        self.trust_modules = trust_modules

    def fit(self, X: Any, y: Any = None) -> ImageEmbedder:
        """Opens the model; looks at no image.

        Raises:
            ValueError: there is no such model or device, or a size is none.
        """
        for name in ("batch_size", "threads"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {getattr(self, name)!r}")
        self.opened_: OpenModel = open_model(
            self.model,
            self.device,
            gallery=self.gallery,
            settings=self.settings,
            trust_modules=self.trust_modules,
        )
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:
        """The unit rows of images, (n, D).

        Raises:
            ValueError: something in X is no image that can be read; the message has its place.
        """
        images = _as_images(X)
        if not hasattr(self, "opened_"):
            self.fit(X)
        opened = self.opened_
        preprocess = preprocess_of(opened.model)
        rows = np.zeros((len(images), self._n_features_out), np.float32)
        with ThreadPoolExecutor(self.threads) as threads, torch.no_grad():
            for start in range(0, len(images), self.batch_size):
                part = list(enumerate(images[start : start + self.batch_size], start=start))
                pixels = np.stack(list(threads.map(lambda one: _pixels(one[0], one[1], preprocess), part)))
                z = opened.model(to_images(pixels, opened.device)).float()
                rows[start : start + len(part)] = F.normalize(z, dim=1).cpu().numpy()
        return rows

    @property
    def _n_features_out(self) -> int:
        """D, for the names of the columns."""
        return int(self.opened_.model.embed_dim)  # type: ignore[arg-type]

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "opened_")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False  # `transform` opens the model where `fit` has not
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        tags.transformer_tags.preserves_dtype = []  # embeddings are float32
        return tags

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "opened_"}


def _as_images(given: Any) -> Sequence[Any] | NDArray[Any]:
    """The images one by one."""
    if isinstance(given, str | os.PathLike | Image.Image):
        raise ValueError(f"expected a sequence of images, got one of type {type(given).__name__}: put it into a list")
    if hasattr(given, "iloc"):  # a data frame, or a column of one
        given = given.to_numpy()
    if isinstance(given, np.ndarray) and given.ndim == 2 and given.shape[1] == 1:
        given = given[:, 0]
    if isinstance(given, np.ndarray) and (given.ndim == 0 or (given.ndim in (2, 3) and given.dtype != object)):
        raise ValueError(f"expected a sequence of images, got an array {given.shape}: one image is given as [image]")
    return given if isinstance(given, Sequence | np.ndarray) else list(_iterable(given))


def _iterable(given: Any) -> Iterator[Any]:
    if not isinstance(given, Iterable):
        raise ValueError(f"expected a sequence of images, got one of type {type(given).__name__}")
    yield from given


def _pixels(place: int, image: Any, preprocess: Preprocess) -> NDArray[np.uint8]:
    """What the model sees of an image, (S, S, 3)."""
    try:
        return preprocess.test(_picture(image))
    except (BadImage, OSError) as error:
        where = f", {image}" if isinstance(image, str | os.PathLike) else ""
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(f"X[{place}]{where}: {why}") from error


def _picture(image: Any) -> Picture:
    if isinstance(image, str | os.PathLike):
        made = encoded(Path(image).read_bytes(), "", None)
        if made.bad is not None:
            raise BadImage(made.bad)
        return open_picture(made.data)
    if isinstance(image, Image.Image):
        return Picture.of(upright(image))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
            raise BadImage(f"an array {image.shape} of {image.dtype}; expected {_PIXELS}")
        return Picture.of(Image.fromarray(image))
    raise BadImage(f"a {type(image).__name__}; expected a path, a PIL image, or an array {_PIXELS}")
