from __future__ import annotations

import copy
import importlib
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import SkipTestWarning
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.utils import estimator_checks

from grappa_dist import load_model
from grappa_dist.integrations.sklearn import ImageEmbedder
from tests.retrieval.photos import model_in, write_photos


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_in(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("photos")
    return [str(folder / name) for name in write_photos(folder)]


def expected(model: str, paths: list[str]) -> np.ndarray:
    loaded = load_model(model)
    return loaded(torch.stack([loaded.transform(Image.open(path)) for path in paths])).numpy()


def test_paths_images_pixels_and_columns_give_the_rows_of_load_model(model: str, paths: list[str]) -> None:
    pandas = pytest.importorskip("pandas")
    embedder = ImageEmbedder(model, batch_size=5).fit(paths)
    right = expected(model, paths)
    opened = [Image.open(path) for path in paths]
    frame = pandas.DataFrame({"file": paths})
    for given in (
        *(paths, tuple(map(Path, paths)), np.array(paths), iter(paths), opened, [np.asarray(one) for one in opened]),
        *(np.stack([np.asarray(one) for one in opened]), frame["file"], frame, frame.to_numpy()),
    ):
        found = embedder.transform(given)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, right, atol=1e-5)
    assert embedder.transform([]).shape == (0, right.shape[1])


def test_it_works_in_a_pipeline_and_names_its_columns(model: str, paths: list[str]) -> None:
    labels = [Path(path).parent.name for path in paths]
    pipeline: Pipeline = make_pipeline(ImageEmbedder(model), KNeighborsClassifier(n_neighbors=1, metric="cosine"))
    assert pipeline.fit(paths, labels).score(paths, labels) == 1.0
    pipeline.set_params(imageembedder__batch_size=3)
    assert pipeline["imageembedder"].get_params()["batch_size"] == 3
    pytest.importorskip("pandas")
    frame = ImageEmbedder(model).set_output(transform="pandas").fit_transform(paths[:2])
    assert list(frame.columns[:2]) == ["imageembedder0", "imageembedder1"]


def test_it_is_cloned_and_sent_elsewhere_without_the_weights(model: str, paths: list[str]) -> None:
    embedder = ImageEmbedder(model, batch_size=7).fit(paths)
    for other in (clone(embedder), copy.deepcopy(embedder), pickle.loads(pickle.dumps(embedder))):
        assert not hasattr(other, "opened_")
        assert other.get_params() == embedder.get_params()
        np.testing.assert_allclose(other.transform(paths[:2]), expected(model, paths[:2]), atol=1e-5)
    assert len(pickle.dumps(embedder)) < 2000


def test_it_passes_the_checks_of_estimators_that_need_no_array_of_numbers(model: str) -> None:
    with pytest.warns(SkipTestWarning, match="which requires input"):  # of those that need one
        found = estimator_checks.check_estimator(ImageEmbedder(model))
    assert {check["status"] for check in found} == {"passed"}
    for check in (
        *("no_attributes_set_in_init", "parameters_default_constructible", "get_params_invariance", "set_params"),
        *("estimator_repr", "valid_tag_types", "estimator_tags_renamed", "mixin_order"),
    ):
        getattr(estimator_checks, f"check_{check}")("ImageEmbedder", ImageEmbedder(model))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("photo.jpg", "expected a sequence of images, got one of type str: put it into a list"),
        (np.zeros((4, 5, 3), np.uint8), "one image is given as [image]"),
        (7, "expected a sequence of images, got one of type int"),
        (["nowhere.jpg"], "X[0], nowhere.jpg: No such file or directory"),
        ([np.zeros((4, 5, 3))], "X[0]: an array (4, 5, 3) of float64; expected (H, W), (H, W, 3) or"),
        ([np.zeros((4, 5, 2), np.uint8)], "X[0]: an array (4, 5, 2) of uint8"),
        ([Image.new("RGB", (4, 4)), None], "X[1]: a NoneType; expected a path"),
    ],
)
def test_what_is_no_image_is_refused_by_its_place(given: Any, words: str, model: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        ImageEmbedder(model).transform(given)


def test_a_damaged_file_and_wrong_parameters_are_refused(tmp_path: Path, model: str) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"X\[0\], .*bad\.png: "):
        ImageEmbedder(model).transform([tmp_path / "bad.png"])
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1, got 0"):
        ImageEmbedder(model, batch_size=0).fit([])
    with pytest.raises(ValueError, match="nowhere: is no folder"):
        ImageEmbedder("nowhere").fit([])


def test_without_scikit_learn_its_install_line_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(sys.modules, "grappa_dist.integrations.sklearn")
    with pytest.raises(ValueError, match=r"is not installed: pip install 'grappa-dist\[sklearn\]'"):
        importlib.import_module("grappa_dist.integrations.sklearn")
