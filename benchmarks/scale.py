"""The whole pipeline at a size: every command that a user would give, with what each stage takes, watched from outside.

Images are drawn, so any number can be had; the ViT is tiny, with random weights, and learns little: what is measured is
time, memory, files and bytes. All lies in one folder, and the same command goes on after a kill. K and batches are
those of every size; only K is bounded by the number of images.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from benchmarks.harness import MIB, Log, aligned, aligned_header, check_least, machine
from benchmarks.processes import DRIVER, GCS, RAYLET, STOPPED, WORKER, Use, Watched, watch
from benchmarks.scale_images import SIZE_PX, draw, encoded_images, parts_of
from grappa_dist._compat import declare_torchvision_ops
from grappa_dist.console import EVENTS_FILE, read_events
from grappa_dist.files import read_json, write_json
from grappa_dist.stages.pseudo_label import ladder

ROOT = Path(__file__).parents[1]
MOST_TEST = 100_000
MOST_LABELS, SETS = 65_536, 4  # the largest K, and how many, each a quarter of the one before
WIDTH, DEPTH, HEADS, PATCH_PX = 64, 4, 2, 8
ON_TEST = ("embed test", "ground_truth", "evaluate")  # stages whose work grows with the test images
BOTH = ("draw", "shards")  # with all images
STEPS = ("draw", "shards", "dry-run before", "run", "again", "dry-run", "exported", "embeddings", "search")


@dataclass(frozen=True)
class ScaleSettings:
    """Options of `bench.py scale`."""

    images: int
    out: Path
    workers: int
    minutes: float | None
    overrides: tuple[str, ...] = ()

    def check(self) -> None:
        check_least(self, images=1000, workers=1)
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"--minutes must be above 0, got {self.minutes:g}")

    @property
    def test_images(self) -> int:
        return min(self.images, MOST_TEST)


class Scale:
    """The steps, each of which is done once; what they took is kept in `<out>/steps`."""

    def __init__(self, settings: ScaleSettings, log: Log) -> None:
        self.settings, self.log, self.out = settings, log, settings.out.absolute()
        self.run_dir, self.steps = self.out / "run", self.out / "steps"
        self._began = time.monotonic()

    def go(self) -> bool:
        """Makes all steps that are left; False where --minutes ended before."""
        self.steps.mkdir(parents=True, exist_ok=True)
        given = {"images": self.settings.images, "overrides": list(self.settings.overrides)}
        known = self.out / "settings.json"
        if known.exists() and read_json(known) != given:
            raise ValueError(f"--out {self.out}: holds {json.dumps(read_json(known))}, not {json.dumps(given)}")
        write_json(known, given)
        for name in STEPS:
            if not (self.steps / f"{name}.json").exists() and not self._step(name):
                self.log(f"{name}: --minutes are over; the same command goes on from here")
                return False
        return True

    def _step(self, name: str) -> bool:
        """One step; False where it was stopped."""
        self.log(name)
        if name == "draw":
            return self._draw()
        if name == "run":
            return self._run()
        if name == "search":
            self._write_query()
        watched = self._watched(name, self._command(name))
        if watched is None:
            return False
        self._keep(name, {name: watched.use()}, ray=RAYLET in watched.roles)
        return True

    def _draw(self) -> bool:
        parts = parts_of(self.settings.images, self.settings.test_images)
        before, began = os.times(), time.monotonic()
        draw(self.out / "drawn", parts, self.settings.workers, self.log)
        after = os.times()
        cpu_s = sum(
            getattr(after, n) - getattr(before, n) for n in ("user", "system", "children_user", "children_system")
        )
        self._keep("draw", {"draw": Use(time.monotonic() - began, cpu_s)})
        return True

    def _run(self) -> bool:
        """The run, whose attempts are added up: a stage that was stopped goes on from its last checkpoint."""
        kept = self.steps / "run.partial.json"
        events = self.run_dir / EVENTS_FILE
        watched = self._watched("run", self._command("run"), ends=(0, STOPPED))
        if watched is None:
            return False
        stages = {name: watched.use(windows) for name, windows in _windows(read_events(events), watched).items()}
        whole = watched.use()
        stages["all else"] = Use(
            whole.seconds - sum(use.seconds for use in stages.values()),
            whole.cpu_s - sum(use.cpu_s for use in stages.values()),
        )
        stages["run"] = whole
        before = {name: Use.of(use) for name, use in read_json(kept)["uses"].items()} if kept.exists() else {}
        added = {name: before.get(name, Use()) + stages.get(name, Use()) for name in {**before, **stages}}
        write_json(kept, {"uses": {name: asdict(use) for name, use in added.items()}})
        if watched.status == STOPPED:
            return False
        self._keep("run", added, ray=True)
        return True

    def _keep(self, name: str, uses: Mapping[str, Use], **facts: Any) -> None:
        write_json(self.steps / f"{name}.json", {"uses": {n: asdict(use) for n, use in uses.items()}, **facts})

    def _watched(self, name: str, command: Sequence[str], ends: Sequence[int] = (0,)) -> Watched | None:
        """The command, watched to its end; None where there is no time left for it."""
        left = None
        if self.settings.minutes is not None:
            left = self.settings.minutes * 60 - (time.monotonic() - self._began)
            if left <= 0:
                return None
        output = self.steps / f"{name}.txt"
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        watched = watch(command, output, env, left if STOPPED in ends else None)
        if watched.status not in ends:
            last = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise ValueError(f"{name}: exit status {watched.status}, see {output}: {' '.join(last)}")
        return watched

    def _command(self, name: str) -> list[str]:
        program = [sys.executable, str(ROOT / "launch/full_pipeline.py")]
        program += ["--config", str(self._config()), "--out", str(self.run_dir)]
        verb = [sys.executable, "-m", "grappa_dist"]
        if name == "shards":
            given = [("--images", path, "--csv", path.with_suffix(".csv")) for path in sorted(self._drawn())]
            pairs = [str(part) for parts in given for part in parts]
            where = ["--out", str(self.out / "shards"), "--split", "column", "--workers", str(self.settings.workers)]
            return [*verb, "shards", *pairs, *where]
        if name.startswith("dry-run"):
            return [*program, "--dry-run"]
        if name == "exported":
            return [*verb, "export", str(self.run_dir), "--name", "average", "--out", str(self.out / "exported")]
        if name == "embeddings":
            shards, workers = str(self.out / "shards/train"), f"resources.workers={self.settings.workers}"
            to = ["--out", str(self.out / "embeddings"), "--index", workers, "embed.batch_size=256"]
            return [*verb, "embed", "--model", str(self.run_dir), "--images", shards, *to]
        if name == "search":
            return [*verb, "search", "--index", str(self.out / "embeddings"), str(self.out / "query.jpg")]
        return program

    def _drawn(self) -> list[Path]:
        names = (part.name for part in parts_of(self.settings.images, self.settings.test_images))
        return [self.out / "drawn" / f"{name}.tar" for name in names]

    def _write_query(self) -> None:
        _, encoded = next(encoded_images(parts_of(self.settings.images, self.settings.test_images)[-1]))
        (self.out / "query.jpg").write_bytes(encoded)

    def _config(self) -> Path:
        weights, path = self.out / "vit.safetensors", self.out / "config.yaml"
        if not weights.exists():
            write_vit(weights)
        if not path.exists():
            path.write_text(yaml.safe_dump(config_of(self.settings, self.out), sort_keys=False), encoding="utf-8")
        return path


def config_of(settings: ScaleSettings, out: Path) -> dict[str, Any]:
    """The settings of the run: the same at every size but for K."""
    top = min(MOST_LABELS, max(ladder(settings.images)))
    tree: dict[str, Any] = {
        "name": f"scale_{settings.images}",
        "data": {"train": str(out / "shards/train"), "test": str(out / "shards/test"), "streams": 64},
        "backbone": {
            "name": "timm:vit_tiny_patch16_224",
            "kwargs": _vit_kwargs(),
            "checkpoint": str(out / "vit.safetensors"),
            "image_size": SIZE_PX,
        },
        "embed": {"batch_size": 256},
        "clustering": {"num_labels": [top // 4**i for i in reversed(range(SETS))]},
        "adapt": {"bottleneck": 16, "epochs": 1, "global_batch": 256, "sets_per_job": 2, "checkpoint_steps": 500},
        "fuse": {
            "variants": ["average", "neighbours"],
            "global_batch": 512,
            "micro_batch": 256,
            "projector": [256, 256],
            "graph": "approximate",
            "checkpoint_steps": 200,
        },
        "resources": {"workers": settings.workers, "cpus_per_worker": 1, "checkpoint_s": 120.0},
    }
    for override in settings.overrides:
        key, _, value = override.partition("=")
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = yaml.safe_load(value)
    return tree


def _vit_kwargs() -> dict[str, Any]:
    return {"img_size": SIZE_PX, "patch_size": PATCH_PX, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}


def write_vit(path: Path) -> None:
    """The weights of the tiny ViT: random, with patches that outweigh places, so that features differ by image."""
    declare_torchvision_ops()
    import timm  # dies beside a CPU torch unless the operators are declared

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **_vit_kwargs())
    weights = model.state_dict()
    weights["patch_embed.proj.weight"] *= 8
    save_file({name: value.contiguous() for name, value in weights.items()}, path)


def _windows(events: Iterable[Mapping[str, Any]], watched: Watched) -> dict[str, list[tuple[float, float]]]:
    """The times of each stage of this attempt; images that are embedded after training are `embed test`."""
    found, open_stage, trained = dict[str, list[tuple[float, float]]](), None, False
    end = watched.looks[-1][0]
    for event in events:
        trained |= event.get("stage") == "adapt"
        if event["t"] < watched.began - 1 or event["t"] > end:
            continue
        if event["name"] == "stage_begins":
            name = str(event["stage"])
            open_stage = ("embed test" if name == "embed" and trained else name, event["t"])
        elif event["name"] == "stage_ends" and open_stage is not None:
            found.setdefault(open_stage[0], []).append((open_stage[1], event["t"]))
            open_stage = None
    if open_stage is not None:  # killed
        found.setdefault(open_stage[0], []).append((open_stage[1], end))
    return found


# What it came to


def figures_of(settings: ScaleSettings) -> dict[str, Any]:
    """All figures of a finished benchmark."""
    out = settings.out.absolute()
    steps = {name: read_json(out / "steps" / f"{name}.json") for name in STEPS}
    uses = {stage: use for step in steps.values() for stage, use in step["uses"].items()}
    return {
        "images": settings.images,
        "test_images": settings.test_images,
        "uses": uses,
        "ray": {name: step.get("ray", False) for name, step in steps.items()},
        "disk": {name: _disk(out / name) for name in ("drawn", "shards", "embeddings")} | _run_disk(out / "run"),
        "graph": _graph(out / "run"),
    }


def _run_disk(run: Path) -> dict[str, tuple[int, int]]:
    """Files and bytes of every kind of artefact."""
    return {
        f"run/{path.name}": _disk(path) for path in sorted(run.iterdir()) if path.is_dir() and not path.is_symlink()
    }


def _disk(folder: Path) -> tuple[int, int]:
    """Files and bytes below a folder."""
    count = size = 0
    for where, _, names in os.walk(folder):
        count += len(names)
        size += sum(os.lstat(os.path.join(where, name)).st_size for name in names)
    return count, size


def _graph(run: Path) -> dict[str, Any]:
    """Kind and recall of the k-NN graph of the fusion."""
    found = [read_json(path) for path in sorted((run / "fusion").glob("*/knn/epoch-*/statistics.json"))]
    return {key: found[-1].get(key) for key in ("graph", "recall", "recall_rows")} if found else {}


def images_of(stage: str, found: Mapping[str, Any]) -> int:
    """How many images a stage's work grows with."""
    train, test = int(found["images"]), int(found["test_images"])
    return train + test if stage in BOTH else test if stage in ON_TEST else train


def as_text(header: dict[str, str], found: Mapping[str, Any]) -> str:
    """One size: seconds, CPU seconds and memory by stage, files and bytes by folder."""
    lines = [
        [
            "",
            "s",
            "CPU s",
            "CPU ms/image",
            "driver MiB",
            "worker MiB",
            "raylet MiB",
            "GCS MiB",
            "store MiB",
            "written MB",
        ]
    ]
    for stage, stored in found["uses"].items():
        use = Use.of(stored)
        own = [f"{use.own[role] / MIB:.0f}" if role in use.own else "-" for role in (DRIVER, WORKER, RAYLET, GCS)]
        each = 1000 * use.cpu_s / images_of(stage, found)
        cells = [f"{use.seconds:.1f}", f"{use.cpu_s:.1f}", f"{each:.3f}", *own]
        lines.append([stage, *cells, f"{use.shared / MIB:.0f}", f"{use.written / 1e6:.0f}"])
    disk = [["", "files", "MB"], *([name, f"{n:,}", f"{size / 1e6:.1f}"] for name, (n, size) in found["disk"].items())]
    graph = f"k-NN graph: {found['graph']}; a second run starts {'a' if found['ray']['again'] else 'no'} Ray"
    return "\n\n".join([aligned_header(header), aligned(lines), aligned(disk), graph])


def compare(paths: Sequence[Path]) -> str:
    """Several sizes as tables in Markdown, with the exponents of growth from each size to the next."""
    found = sorted((read_json(path) for path in paths), key=lambda size: int(size["images"]))
    sizes = [f"{size['images']:,}" for size in found]
    seconds = _table(found, sizes, "seconds", lambda use: use.seconds, "{:.1f}")
    cpu = _table(found, sizes, "CPU ms an image", lambda use: use.cpu_s, "{:.3f}", each=True)
    memory = [
        _table(found, sizes, f"MiB of a {role} at most", lambda use, role=role: use.own.get(role, 0) / MIB, "{:.0f}")  # type: ignore[misc]
        for role in (DRIVER, WORKER, RAYLET)
    ]
    names = dict.fromkeys(name for size in found for name in size["disk"])
    rows = [[n, *(f"{size['disk'].get(n, (0, 0))[i]:,}" for size in found for i in (0, 1))] for n in names]
    heads = [f"{what} at {size}" for size in sizes for what in ("files", "bytes")]
    return "\n\n".join([seconds, cpu, *memory, markdown(["", *heads], rows)])


def _table(
    found: Sequence[Mapping[str, Any]],
    sizes: Sequence[str],
    title: str,
    figure: Callable[[Use], float],
    form: str,
    *,
    each: bool = False,
) -> str:
    """A figure by stage and size, and its exponent: 1 is linear (0 for a figure of each image), 0 is flat."""
    rows = list[list[str]]()
    for stage in dict.fromkeys(stage for size in found for stage in size["uses"]):
        values = list[tuple[int, float]]()
        for size in found:
            if stage in size["uses"]:
                count = images_of(stage, size)
                value = figure(Use.of(size["uses"][stage]))
                values.append((count, 1000 * value / count if each else value))
        shown = [form.format(value) for _, value in values] + ["-"] * (len(found) - len(values))
        rows.append([stage, *shown, ", ".join(_exponents(values))])
    return markdown([title, *sizes, "exponents"], rows)


def _exponents(values: Sequence[tuple[int, float]]) -> Iterator[str]:
    for (n, a), (m, b) in pairwise(values):
        yield f"{math.log(b / a) / math.log(m / n):.2f}" if m > n and a > 0 and b > 0 else "-"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


SHORT = "the whole pipeline at a size: time, memory and bytes by stage"
DESCRIPTION = f"""\
Draws labelled images of {SIZE_PX} pixels, makes shards and gives the commands that a user would: a run, the same
again, --dry-run, export, embeddings with an index, a search. Prints seconds, CPU seconds and memory by stage, and files
and bytes by folder. A tiny ViT with random weights, {SETS} sets, K up to {MOST_LABELS:,}, an approximate k-NN graph; as
many test images as training images, {MOST_TEST:,} at most, half of them one task. Goes on after a kill. --compare makes
tables of several sizes from the files of --json, and measures nothing. Linux."""
EXAMPLE = """examples, ten minutes, and hours:
  python launch/bench.py scale --images 10000 --out runs/scale_4 --json runs/scale_4.json
  python launch/bench.py scale --images 1000000 --out runs/scale_6 --json runs/scale_6.json
  python launch/bench.py scale --compare runs/scale_4.json runs/scale_6.json"""


def arguments(add: Callable[..., Any]) -> None:
    add("--images", type=int, default=10_000, metavar="N", help="to train on; default: %(default)s")
    add("--out", type=Path, metavar="DIR", help="gets all that is made; default: runs/scale_N")
    add("--workers", type=int, default=2, metavar="N", help="processes; default: %(default)s")
    add("--minutes", type=float, metavar="M", help="end after so long, with state saved; the next call goes on")
    add("--compare", type=Path, nargs="+", metavar="JSON", help="print tables of these results instead")
    add("overrides", nargs="*", metavar="key=value", help="of the run's config, e.g. adapt.epochs=2")


def run(options: dict[str, Any], log: Log) -> tuple[str, dict[str, Any]]:
    compared, minutes = options.pop("compare"), options.pop("minutes")
    if compared:
        return compare(compared), {}
    out, overrides = options.pop("out"), tuple(options.pop("overrides"))
    out = out or Path(f"runs/scale_{options['images']}")
    settings = ScaleSettings(**options, out=out, minutes=minutes, overrides=overrides)
    settings.check()
    header = machine(1, "ray", "deepspeed", "faiss-cpu", "timm")
    if not Scale(settings, log).go():
        return f"stopped after {minutes:g} minutes; the same command goes on", {}
    found = figures_of(settings)
    return as_text(header, found), {"machine": header, **found}
