"""The paper in one straightforward script of one process, as a judge of the whole pipeline.

Written as a researcher would who has timm, faiss and a DataLoader: plain modules, autograd through whatever is frozen,
one adaptor set after the other, all logits of the classifier at once. It shares with the package what it judges
nothing of: the settings, the backbone, the Barlow Twins loss, the projector and LARS.

Shapes: n images, B of a batch, T tokens, D channels, N adaptor sets, K labels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks import faiss_baselines as judges
from benchmarks.faiss_baselines import flat_index_knn
from grappa_dist._compat import declare_torchvision_ops
from grappa_dist.config import Config, FuseConfig
from grappa_dist.make_shards.building import Tell
from grappa_dist.models import Backbone
from grappa_dist.models.spec import build_backbone
from grappa_dist.training.barlow_twins_loss import Projector, barlow_twins
from grappa_dist.training.loop import cosine
from grappa_dist.training.optim import Lars

AVERAGE, TRANSFORMS, NEIGHBOURS = "average", "transforms", "neighbours"


@dataclass(frozen=True)
class Pictures:
    """Image files, and what the script may know of them once it evaluates."""

    files: list[Path]
    tasks: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)


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


class Views(Dataset[tuple[Tensor, ...]]):
    """Views of images, each followed by its number; pairs where `partner` says of whom the second view is."""

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
    """`run` gives R-Precision by model and task; `seconds` by step fill up as it goes."""

    def __init__(self, config: Config, train: Pictures, test: Pictures, threads: int, tell: Tell) -> None:
        self.config, self.train, self.test, self.threads, self.tell = config, train, test, threads, tell
        self.seconds: dict[str, float] = {}
        self._preprocess = build_backbone(config.backbone).preprocess

    def run(self) -> dict[str, dict[str, float]]:
        torch.manual_seed(self.config.seed)
        torch.set_num_threads(self.threads)
        judges.set_threads(self.threads)
        clustering = self.config.clustering
        assert clustering.num_labels != "auto"
        with self._timed("embed"):
            features = self._embed(self._backbone(), self.train.files)
        with self._timed("pseudo_label"):
            found = {k: self._cluster(features, k) for k in clustering.num_labels}
        with self._timed("adapt"):
            sets = {k: self._adapt(k, *found[k]) for k in clustering.num_labels}
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
        self.tell(f"the script: {step}")
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
        """Labels (n,) and centroids (K, D)."""
        initial = judges.seed_by_faiss(features, k, self.config.seed)
        found = judges.judges()[judges.PLAIN](features, initial, self.config.clustering.iterations, self.config.seed)
        return torch.from_numpy(found.labels), torch.from_numpy(found.centroids)

    def _adapt(self, k: int, labels: Tensor, centroids: Tensor) -> list[nn.Module]:
        """One adaptor set, by layer."""
        config = self.config.adapt
        model = self._backbone()
        adaptors = [Adaptor(model.embed_dim, config.bottleneck) for _ in model.blocks]
        for layer, block in enumerate(list(model.blocks)):
            model.blocks[layer] = nn.Sequential(block, adaptors[layer])
        rows = nn.Parameter(F.normalize(centroids, dim=1))
        if config.classifier == "random":
            nn.init.normal_(rows)
        learning = [rows, *(p for adaptor in adaptors for p in adaptor.parameters())]
        optimizer = torch.optim.Adam(learning, config.learning_rate, weight_decay=config.weight_decay)
        loader = self._loader(self._random_views(config.min_crop_area), config.global_batch, shuffle=True)
        schedule = _schedule(optimizer, config.epochs * len(loader), config.warmup_steps)
        for epoch in range(config.epochs):
            self.tell(f"the script: adapt K={k}, epoch {epoch + 1} of {config.epochs}")
            for images, numbers in loader:
                logits = config.gamma * F.normalize(model(images), dim=1) @ F.normalize(rows, dim=1).T
                optimizer.zero_grad()
                F.cross_entropy(logits, labels[numbers]).backward()
                if config.clip_norm is not None:
                    nn.utils.clip_grad_norm_(learning[1:], config.clip_norm)
                optimizer.step()
                schedule.step()
        return [adaptor.requires_grad_(False) for adaptor in adaptors]

    def _fuse(self, sets: Sequence[Sequence[nn.Module]], variant: str) -> nn.Module:
        """Attention over frozen sets, learned from pairs."""
        config: FuseConfig = self.config.fuse
        model = self._fused(sets, attention=True)
        projector = Projector(model.embed_dim, config.projector)
        projector.initialise(torch.Generator().manual_seed(self.config.seed))
        learning = [p for p in (*model.parameters(), *projector.parameters()) if p.requires_grad]
        optimizer = Lars(learning, config.lars_learning_rate, weight_decay=config.lars_weight_decay)
        views, draws = self._random_views(config.min_crop_area), np.random.default_rng(self.config.seed)
        loader = self._loader(views, config.global_batch, shuffle=True)
        schedule = _schedule(optimizer, config.epochs * len(loader), config.warmup_steps)
        for epoch in range(config.epochs):
            self.tell(f"the script: fuse {variant}, epoch {epoch + 1} of {config.epochs}")
            views.partner = np.arange(len(views))
            if variant == NEIGHBOURS:
                nearest = flat_index_knn(self._embed(model, self.train.files), config.neighbours + 1, self.threads)
                views.partner = nearest[views.partner, draws.integers(1, config.neighbours + 1, len(views))]
            for one, other, _ in loader:
                loss = barlow_twins(projector(model(one)), projector(model(other)), config.beta)
                optimizer.zero_grad()
                (config.loss_scale * loss).backward()
                optimizer.step()
                schedule.step()
        return model

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


def _schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(min(step, steps), steps, warmup))


def _transforms() -> Any:
    declare_torchvision_ops()
    from torchvision import transforms

    return transforms
