from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.pipeline import STEPS
from examples import paper_in_one_file
from examples.paper_in_one_file import Adaptor, Fused, PaperScript, Pictures
from grappa_dist.config import load
from grappa_dist.training.barlow_twins_loss import Projector, barlow_twins
from grappa_dist.training.loop import cosine
from grappa_dist.training.optim import Lars

CONFIG, SCRIPT = "configs/demo.yaml", Path(paper_in_one_file.__file__)
SMALL = [
    *("clustering.num_labels=[2,3]", "clustering.iterations=2"),
    *("adapt.epochs=1", "adapt.global_batch=8", "adapt.learning_rate=0.1"),
    *("fuse.epochs=1", "fuse.global_batch=12", "fuse.projector=[8,8]", "fuse.neighbours=2"),
]


def drawn_pictures(folder: Path, count: int, seed: int) -> Pictures:
    """Images as TASK/LABEL/FILE."""
    draws = np.random.default_rng(seed)
    pictures = Pictures([])
    for i in range(count):
        pictures.tasks.append("a" if i % 2 else "b")
        pictures.labels.append(str(i % 3))
        pictures.files.append(folder / pictures.tasks[-1] / pictures.labels[-1] / f"{i}.png")
        pictures.files[-1].parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(pictures.files[-1])
    return pictures


def test_the_script_trains_and_scores_every_model(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    pytest.importorskip("pytorch_metric_learning")
    pictures = drawn_pictures(tmp_path / "train", 20, 0), drawn_pictures(tmp_path / "test", 18, 1)
    script = PaperScript(load(CONFIG, SMALL), *pictures, threads=1, log=lambda line: None)
    scores = script.run()
    assert list(scores) == ["backbone", "k=2", "k=3", "average", "transforms", "neighbours"]
    assert all(sorted(by_task) == ["a", "b"] for by_task in scores.values())
    assert len({tuple(by_task.values()) for by_task in scores.values()}) > 1, "training changed nothing"
    assert list(script.seconds) == list(STEPS)


def test_the_script_is_a_program_that_starts_from_any_folder(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--help"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "--train DIR" in done.stdout


def test_the_program_reads_tasks_and_labels_from_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = drawn_pictures(tmp_path / "test", 12, 0)
    given: list[Pictures] = []

    def run(script: PaperScript) -> dict[str, dict[str, float]]:
        given.extend([script.train, script.test])
        return {"backbone": {"a": 0.25, "b": 0.5}}

    monkeypatch.setattr(PaperScript, "run", run)
    folders = ["--train", str(tmp_path / "test"), "--test", str(tmp_path / "test")]
    paper_in_one_file.main(["--config", CONFIG, *folders, *SMALL])
    train, test = given
    assert sorted(train.files) == sorted(expected.files)
    found = zip(test.files, test.tasks, test.labels, strict=True)
    assert sorted(found) == sorted(zip(expected.files, expected.tasks, expected.labels, strict=True))
    assert "backbone: R-Precision a 25.0, b 50.0" in capsys.readouterr().out


def test_fused_layers_of_fresh_adaptors_are_their_block() -> None:
    block = torch.nn.Linear(6, 6)
    for attention in (False, True):
        layer = Fused(block, [Adaptor(6, 2), Adaptor(6, 2)], 6, attention=attention)
        tokens = torch.randn(3, 4, 6)
        assert torch.allclose(layer(tokens), block(tokens), atol=1e-6)


def test_the_loss_behind_the_projector_is_that_of_the_package() -> None:
    torch.manual_seed(0)
    za, zb = torch.randn(2, 9, 6)
    ours, plain = Projector(6, (5, 4, 7)), paper_in_one_file.projector(6, (5, 4, 7))
    weights = [layer for layer in plain if isinstance(layer, torch.nn.Linear)]
    for mine, theirs in zip(weights, ours.linears, strict=True):
        mine.weight.data.copy_(theirs.weight)  # type: ignore[arg-type]
    found = paper_in_one_file.barlow_twins(plain(za), plain(zb), 0.005)
    torch.testing.assert_close(found, barlow_twins(ours(za), ours(zb), 0.005))


def test_steps_of_lars_and_of_the_schedule_are_those_of_the_package() -> None:
    torch.manual_seed(0)
    shapes, rates = [(4, 3), (5,), (2, 6)], []
    starts = [torch.randn(shape) for shape in shapes]
    sides = [[start.clone().requires_grad_() for start in starts] for _ in range(2)]
    plain = paper_in_one_file.Lars(sides[0], 0.5, weight_decay=0.01)
    ours = Lars(sides[1], 0.5, weight_decay=0.01)
    schedule = paper_in_one_file.schedule_of(plain, 6, 2)
    for step in range(6):
        grads = [torch.randn(shape) for shape in shapes]
        rates.append(plain.param_groups[0]["lr"] / 0.5)
        ours.param_groups[0]["lr"] = 0.5 * cosine(step, 6, 2)
        for optimizer, params in ((plain, sides[0]), (ours, sides[1])):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.clone()
            optimizer.step()
        schedule.step()
    assert rates == pytest.approx([cosine(step, 6, 2) for step in range(6)])
    for a, b in zip(*sides, strict=True):
        torch.testing.assert_close(a, b)
