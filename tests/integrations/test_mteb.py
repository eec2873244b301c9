"""The encoder of mteb: what it takes, and a task of MIEB's form that is made here, which `evaluate` agrees with."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from grappa_dist.integrations import mteb as integration
from grappa_dist.retrieval.evaluation import evaluate
from grappa_dist.retrieval.images import open_images
from tests.retrieval.photos import embedder, model_in, write_photos
from tests.retrieval.test_ranking_references import DEPTHS, ours, run_and_qrels, split_case
from tests.stages import tiny
from tests.test_docs import DOCS, section

IMAGES = SimpleNamespace(name="birds", get_modalities=lambda prompt_type: ["image"])


def pictures(count: int) -> list[Image.Image]:
    return [Image.open(io.BytesIO(tiny.picture(number))) for number in range(count)]


def test_images_are_embedded_as_by_the_model_and_text_is_refused(tmp_path: Path) -> None:
    model = model_in(tmp_path / "run")
    encoder = integration.Encoder(model, device="cpu")
    batches = [{"image": pictures(5)[:3]}, {"image": pictures(5)[3:]}]
    found = encoder.encode(batches, task_metadata=IMAGES, hf_split="test", hf_subset="default", batch_size=3)
    (tmp_path / "photos").mkdir()
    for number in range(5):
        (tmp_path / "photos" / f"{number}.png").write_bytes(tiny.picture(number))
    assert found == pytest.approx(embedder(model).embed(open_images([str(tmp_path / "photos")])).rows, abs=1e-5)
    cosines = encoder.similarity(found, torch.from_numpy(found))
    assert cosines.diagonal().tolist() == pytest.approx([1] * 5)
    assert encoder.similarity_pairwise(found, found[::-1].copy()).tolist() == pytest.approx(
        cosines.flip(1).diagonal().tolist(), abs=1e-6
    )
    text = SimpleNamespace(name="captions", get_modalities=lambda prompt_type: ["image", "text"])
    with pytest.raises(ValueError, match="captions: has image and text; expected a task of images alone"):
        encoder.encode(batches, task_metadata=text)


def local_task(queries: Path, gallery: Path) -> Any:
    """A retrieval task of mteb with images of class folders, without any download."""
    from datasets import Dataset, Features, Value
    from datasets import Image as Picture
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    def rows(folder: Path) -> Dataset:
        files = sorted(folder.rglob("*.png"))
        found = {"id": [str(path.relative_to(folder)) for path in files], "image": [str(path) for path in files]}
        return Dataset.from_dict(found, features=Features({"id": Value("string"), "image": Picture()}))

    class Local(AbsTaskRetrieval):  # type: ignore[misc]
        metadata = TaskMetadata(
            name="Local",
            description="Photos of this test.",
            dataset={"path": "local", "revision": "1"},
            type="Any2AnyRetrieval",
            category="i2i",
            modalities=["image"],
            eval_langs=["eng-Latn"],
            main_score="map_at_10",
        )

        def load_data(self, **_: Any) -> None:
            asked, corpus = rows(queries), rows(gallery)
            relevant = {
                query: {name: 1 for name in corpus["id"] if name.split("/")[0] == query.split("/")[0]}
                for query in asked["id"]
            }
            split = {"queries": asked, "corpus": corpus, "relevant_docs": relevant, "top_ranked": None}
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return Local()


@pytest.mark.long
def test_a_task_of_mieb_runs_and_its_figures_are_those_of_evaluate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mteb = pytest.importorskip("mteb")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    model = model_in(Path("runs", "mine"))
    write_photos(tmp_path / "gallery")
    for label, numbers in {"cat": (52, 60), "anemone": (57,), "dog": (31,)}.items():
        (tmp_path / "asked" / label).mkdir(parents=True)
        for number in numbers:
            (tmp_path / "asked" / label / f"{number}.png").write_bytes(tiny.picture(number))
    task = local_task(tmp_path / "asked", tmp_path / "gallery")
    monkeypatch.setattr(mteb, "get_tasks", lambda tasks: [task])
    (example,) = re.findall(r"^```python\n(.*?)^```", section(DOCS["docs/evaluate.md"], "mteb"), re.M | re.S)
    names: dict[str, Any] = {}
    exec(example, names)
    (theirs,) = names["results"].task_results[0].scores["test"]
    found = evaluate(model, queries="asked", gallery="gallery", against=None)
    (scores,) = found.means.values()
    assert scores.queries == 3  # mteb leaves out the dog, too
    for k in DEPTHS:
        for metric, name in (("map", "map"), ("precision", "precision"), ("recall", "hit_rate")):
            value = scores.figures[f"{metric}_at_{k}"].value
            assert value == pytest.approx(theirs[f"{name}_at_{k}"], abs=2e-5)
    meta = names["encoder"].mteb_model_meta
    assert (meta.name, meta.modalities) == (f"grappa_dist/{names['encoder'].opened.variant}", ["image"])
    check_scores_of_mteb()


def check_scores_of_mteb() -> None:
    """On a case with ties, by mteb's own function; here, as mteb is imported by now."""
    from mteb._evaluators.retrieval_metrics import calculate_retrieval_scores

    case = split_case(ties=True)
    _, found = ours(*case)
    run, qrels = run_and_qrels(*case)
    theirs = calculate_retrieval_scores({query: run[query] for query in qrels}, dict(qrels), list(DEPTHS))
    for place, k in enumerate(DEPTHS):
        for metric, values in (("map", theirs.map), ("precision", theirs.precision), ("recall", theirs.hit_rate)):
            assert np.mean(found[f"{metric}_at_{k}"]) == pytest.approx(list(values.values())[place], abs=1e-5)
