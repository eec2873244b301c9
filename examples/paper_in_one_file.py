"""The paper in one straightforward script of one process: embed, k-means, adapt, fuse, evaluate.

Written with timm, faiss and a DataLoader alone: plain modules, autograd through the frozen backbone, one adaptor set
after the other, all logits of the classifier at once. Of the package, which must be installed, it imports the settings
and the backbone. It is the baseline of `launch/bench.py pipeline`, and runs on folders of images, the test images as
TASK/LABEL/FILE:

    python examples/paper_in_one_file.py --config configs/demo.yaml --train DIR --test DIR adapt.epochs=1

Shapes: n images, B of a batch, T tokens, D channels, N adaptor sets, K labels.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from grappa_dist._compat import declare_torchvision_ops
from grappa_dist.config import Config, FuseConfig, load
from grappa_dist.models import Backbone
from grappa_dist.models.spec import build_backbone

AVERAGE, TRANSFORMS, NEIGHBOURS = "average", "transforms", "neighbours"


class Adaptor(nn.Module):
    """h + up(GELU(down(h))), up at zero."""

    def __init__(self, dim: int, bottleneck: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, bottleneck), nn.Linear(bottleneck, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h: Tensor) -> Tensor:
        adapted: Tensor = h + self.up(F.gelu(self.down(h)))
        return adapted


class Fused(nn.Module):
    """A block, its N frozen adaptors, and attention over their outputs; without attention their mean."""

    def __init__(self, block: nn.Module, adaptors: Sequence[nn.Module], dim: int, *, attention: bool) -> None:
        super().__init__()
        self.block, self.adaptors = block, nn.ModuleList(adaptors)
        self.query = nn.Linear(dim, dim, bias=False) if attention else None
        self.key = nn.Linear(dim, dim, bias=False) if attention else None

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.block(tokens)
        outputs = torch.stack([adaptor(h) for adaptor in self.adaptors], 1)  # (B, N, T, D)
        if self.query is None or self.key is None:
            return outputs.mean(1)
        logits = (self.query(h.mean(1))[:, None] * self.key(outputs.mean(2))).sum(2) / math.sqrt(h.shape[-1])
        return (logits.softmax(1)[:, :, None, None] * outputs).sum(1)


def norm_softmax(z: Tensor, weight: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Eq. (2): cross-entropy over the scaled cosines of z (B, D) and the classes' rows (K, D)."""
    return F.cross_entropy(gamma * F.normalize(z, dim=1) @ F.normalize(weight, dim=1).T, labels)


def barlow_twins(za: Tensor, zb: Tensor, beta: float) -> Tensor:
    """Eq. (4) of B pairs: the correlation matrix of the two views (B, D) against the identity."""
    a, b = ((z - z.mean(0)) / torch.sqrt(z.var(0, unbiased=False) + 1e-5) for z in (za, zb))
    c = a.T @ b / len(za)  # (D, D)
    on = torch.diagonal(c)
    return (1 - on).square().sum() + beta * (c.square().sum() - on.square().sum())


def projector(dim: int, widths: Sequence[int]) -> nn.Sequential:
    """Linear-BN-ReLU for all widths but the last, then Linear; no biases."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([dim, *widths]):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-2])


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling with momentum 0.9; biases and norms without it and without weight decay."""

    def __init__(self, params: Any, lr: float, *, weight_decay: float, eta: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "eta": eta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in (p for p in group["params"] if p.grad is not None):
                grad = param.grad
                if param.ndim > 1:
                    grad = grad + group["weight_decay"] * param
                    length, grad_length = param.norm(), grad.norm()
                    if length > 0 and grad_length > 0:
                        grad = grad * (group["eta"] * length / grad_length)
                momentum = self.state[param].setdefault("momentum", torch.zeros_like(param))
                momentum.mul_(0.9).add_(grad)
                param.sub_(group["lr"] * momentum)


def schedule_of(optimizer: torch.optim.Optimizer, total: int, warmup: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A linear warm-up, then half a cosine down to 0 at step `total`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (min(step, total) - warmup) / (total - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@dataclass(frozen=True)
class Pictures:
    """Image files; tasks and labels are read by the evaluation alone."""

    files: list[Path]
    tasks: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)


class Views(Dataset[tuple[Tensor, ...]]):
    """Views of images, each followed by its number; pairs of views where `partner` has the image of the second one."""

    def __init__(self, files: Sequence[Path], transform: Callable[[Image.Image], Tensor]) -> None:
        self.files, self.transform = files, transform
        self.partner: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[Any, ...]:
        if self.partner is None:
            return self._view(row), row
        return self._view(row), self._view(int(self.partner[row])), row

    def _view(self, row: int) -> Tensor:
        with Image.open(self.files[row]) as image:
            return self.transform(image.convert("RGB"))


class PaperScript:
    """`run` returns R-Precision by model and task; `seconds` has the time of each step that is done."""

    def __init__(
        self, config: Config, train: Pictures, test: Pictures, threads: int, log: Callable[[str], None]
    ) -> None:
        self.config, self.train, self.test, self.threads, self.log = config, train, test, threads, log
        self.seconds: dict[str, float] = {}
        self._preprocess = build_backbone(config.backbone).preprocess

    def run(self) -> dict[str, dict[str, float]]:
        torch.manual_seed(self.config.seed)
        torch.set_num_threads(self.threads)
        _faiss().omp_set_num_threads(self.threads)
        num_labels = self.config.clustering.num_labels
        assert num_labels != "auto"
        with self._timed("embed"):
            features = self._embed(self._backbone(), self.train.files)
        with self._timed("pseudo_label"):
            clusterings = {k: self._cluster(features, k) for k in num_labels}
        with self._timed("adapt"):
            sets = {k: self._adapt(k, *clusterings[k]) for k in num_labels}
        models: dict[str, nn.Module] = {"backbone": self._backbone()}
        models |= {f"k={k}": self._fused([layers], attention=False) for k, layers in sets.items()}
        models[AVERAGE] = self._fused(list(sets.values()), attention=False)
        with self._timed("fuse"):
            for variant in (TRANSFORMS, NEIGHBOURS):
                models[variant] = self._fuse(list(sets.values()), variant)
        with self._timed("evaluate"):
            return {name: self._scores(model) for name, model in models.items()}

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        self.log(f"the script: {step}")
        start = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - start

    def _backbone(self) -> Backbone:
        return build_backbone(self.config.backbone)

    def _fused(self, sets: Sequence[Sequence[nn.Module]], *, attention: bool) -> Backbone:
        backbone = self._backbone()
        for layer, block in enumerate(list(backbone.blocks)):
            adaptors = [layers[layer] for layers in sets]
            backbone.blocks[layer] = Fused(block, adaptors, backbone.embed_dim, attention=attention)
        return backbone

    def _loader(self, views: Views, batch: int, *, shuffle: bool) -> DataLoader[Any]:
        return DataLoader(views, batch, shuffle=shuffle, num_workers=self.threads)

    def _plain_views(self, files: Sequence[Path]) -> Views:
        transforms = _transforms()
        size = self._preprocess.image_size
        steps = [transforms.Resize(size, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(size)]
        return Views(files, transforms.Compose([*steps, transforms.ToTensor()]))

    def _random_views(self, min_area: float) -> Views:
        transforms = _transforms()
        crop = transforms.RandomResizedCrop(
            self._preprocess.image_size, (min_area, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
        )
        steps = [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        return Views(self.train.files, transforms.Compose(steps))

    @torch.no_grad()
    def _embed(self, model: nn.Module, files: Sequence[Path]) -> np.ndarray:
        loader = self._loader(self._plain_views(files), self.config.embed.batch_size, shuffle=False)
        return torch.cat([F.normalize(model(images), dim=1) for images, _ in loader]).numpy()

    def _cluster(self, features: np.ndarray, k: int) -> tuple[Tensor, Tensor]:
        """Labels (n,) and centroids (K, D), by k-means++ and k-means on all rows."""
        faiss, seed, (rows, dim) = _faiss(), self.config.seed, features.shape
        seeding = faiss.ClusteringInitialization(dim, k)
        seeding.method, seeding.seed = faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS, seed
        initial = np.empty((k, dim), dtype=np.float32)
        seeding.init_centroids(rows, faiss.swig_ptr(features), faiss.swig_ptr(initial))
        how = {"niter": self.config.clustering.iterations, "seed": seed}
        kmeans = faiss.Kmeans(dim, k, max_points_per_centroid=rows, min_points_per_centroid=1, **how)
        kmeans.train(features, init_centroids=initial)
        labels = kmeans.index.search(features, 1)[1][:, 0]
        return torch.from_numpy(labels), torch.from_numpy(kmeans.centroids)

    def _adapt(self, k: int, labels: Tensor, centroids: Tensor) -> list[nn.Module]:
        """One adaptor set, by layer."""
        config = self.config.adapt
        model = self._backbone()
        adaptors = [Adaptor(model.embed_dim, config.bottleneck) for _ in model.blocks]
        for layer, block in enumerate(list(model.blocks)):
            model.blocks[layer] = nn.Sequential(block, adaptors[layer])
        classes = nn.Parameter(F.normalize(centroids, dim=1))
        if config.classifier == "random":
            nn.init.normal_(classes)
        learning = [classes, *(p for adaptor in adaptors for p in adaptor.parameters())]
        optimizer = torch.optim.Adam(learning, config.learning_rate, weight_decay=config.weight_decay)
        loader = self._loader(self._random_views(config.min_crop_area), config.global_batch, shuffle=True)
        schedule = schedule_of(optimizer, config.epochs * len(loader), config.warmup_steps)
        for epoch in range(config.epochs):
            self.log(f"the script: adapt K={k}, epoch {epoch + 1} of {config.epochs}")
            for images, numbers in loader:
                optimizer.zero_grad()
                norm_softmax(model(images), classes, labels[numbers], config.gamma).backward()
                if config.clip_norm is not None:
                    nn.utils.clip_grad_norm_(learning[1:], config.clip_norm)
                optimizer.step()
                schedule.step()
        return [adaptor.requires_grad_(False) for adaptor in adaptors]

    def _fuse(self, sets: Sequence[Sequence[nn.Module]], variant: str) -> nn.Module:
        """Attention over frozen sets, trained on pairs."""
        config: FuseConfig = self.config.fuse
        model = self._fused(sets, attention=True)
        project = projector(model.embed_dim, config.projector)
        learning = [p for p in (*model.parameters(), *project.parameters()) if p.requires_grad]
        optimizer = Lars(learning, config.lars_learning_rate, weight_decay=config.lars_weight_decay)
        views, rng = self._random_views(config.min_crop_area), np.random.default_rng(self.config.seed)
        loader = self._loader(views, config.global_batch, shuffle=True)
        schedule = schedule_of(optimizer, config.epochs * len(loader), config.warmup_steps)
        for epoch in range(config.epochs):
            self.log(f"the script: fuse {variant}, epoch {epoch + 1} of {config.epochs}")
            views.partner = np.arange(len(views))
            if variant == NEIGHBOURS:
                nearest = self._nearest(model, config.neighbours + 1)  # the first is the image itself
                views.partner = nearest[views.partner, rng.integers(1, config.neighbours + 1, len(views))]
            for one, other, _ in loader:
                loss = barlow_twins(project(model(one)), project(model(other)), config.beta)
                optimizer.zero_grad()
                (config.loss_scale * loss).backward()
                optimizer.step()
                schedule.step()
        return model

    def _nearest(self, model: nn.Module, k: int) -> np.ndarray:
        """The k nearest training images of each, (n, k)."""
        features = self._embed(model, self.train.files)
        index = _faiss().IndexFlatIP(features.shape[1])
        index.add(features)
        ids: np.ndarray = index.search(features, k)[1]
        return ids

    def _scores(self, model: nn.Module) -> dict[str, float]:
        """R-Precision of every task."""
        from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

        calculator = AccuracyCalculator(include=("r_precision",), k="max_bin_count", device=torch.device("cpu"))
        z, tasks, scores = self._embed(model, self.test.files), np.array(self.test.tasks), dict[str, float]()
        for task in sorted(set(self.test.tasks)):
            labels = np.unique(np.array(self.test.labels)[tasks == task], return_inverse=True)[1]
            of_task = torch.from_numpy(z[tasks == task])
            scores[task] = float(calculator.get_accuracy(of_task, torch.from_numpy(labels))["r_precision"])
        return scores


def _faiss() -> Any:
    import faiss

    return faiss


def _transforms() -> Any:
    declare_torchvision_ops()
    from torchvision import transforms

    return transforms


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="its data section is not used")
    parser.add_argument("--train", type=Path, required=True, metavar="DIR", help="images anywhere below")
    parser.add_argument("--test", type=Path, required=True, metavar="DIR", help="images as TASK/LABEL/FILE")
    parser.add_argument("--threads", type=int, default=2, help="and processes that decode (default %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config, e.g. adapt.epochs=1")
    given = parser.parse_args(arguments)
    train = Pictures(sorted(path for path in given.train.rglob("*") if path.is_file()))
    files = sorted(path for path in given.test.glob("*/*/*") if path.is_file())
    test = Pictures(files, [path.parts[-3] for path in files], [path.parts[-2] for path in files])
    script = PaperScript(load(given.config, given.overrides), train, test, given.threads, print)
    for model, scores in script.run().items():
        print(f"{model}: R-Precision " + ", ".join(f"{task} {100 * score:.1f}" for task, score in scores.items()))


if __name__ == "__main__":
    main()
