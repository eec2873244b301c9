"""The same run with several seeds, each in a folder of its own, and what they have come to together."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grappa_dist.artifacts import Artifact, Store
from grappa_dist.bucket import bucket_of
from grappa_dist.config import CONFIG_FILE, Config
from grappa_dist.data.open_images import generated_artifacts, is_generated, open_images
from grappa_dist.files import make_folder, remove_folder, rename, write_json, write_utf8
from grappa_dist.inputs import look
from grappa_dist.layout import lay_out
from grappa_dist.pipeline import Finished, run
from grappa_dist.report.seeds import seeds_json, seeds_lines, seeds_page, seeds_table, verdict_json
from grappa_dist.report.verdict import without_labels
from grappa_dist.stages.flow import artifacts_of
from grappa_dist.stages.run import configs_of_seeds
from grappa_dist.verdict import SeedsVerdict, verdict_over


@dataclass(frozen=True)
class FinishedSeeds:
    """What runs of several seeds have come to."""

    root: Path  # its `model` is that of the first seed, its `report` of all
    runs: Mapping[int, Finished]  # by seed
    verdict: SeedsVerdict | None  # None without labelled test images

    def text(self) -> str:
        """All that is printed at the end; the verdict over seeds last."""
        first = next(iter(self.runs.values()))
        places = [f"report  {self.root / 'report' / 'report.html'}"]
        places += [f"model   {self.root / 'model'}  (of the first seed: none is chosen by its score)"]
        places += [first.left_out] if first.left_out else []
        if self.verdict is None:
            return "\n".join([*places, *without_labels(str(self.root), has_test=first.has_test, why=first.labels)])
        table = seeds_table({seed: one.rows for seed, one in self.runs.items()})
        return "\n".join([table, "", *places, *seeds_lines(self.verdict, str(self.root))])

    def figures(self) -> dict[str, Any]:
        """The same for programs."""
        runs = {seed: one.figures() for seed, one in self.runs.items()}
        return {"runs": runs, "model": str(self.root / "model"), "verdict": verdict_json(self.verdict)}


def parse_seeds(text: str) -> list[int]:
    """Seeds as a command line has them, for example "0,1,2".

    Raises:
        ValueError: these are no different whole numbers of at least 0.
    """
    parts = [part.strip() for part in text.split(",")]
    seeds = [int(part) for part in parts if re.fullmatch(r"\d{1,19}", part)]
    if len(seeds) < len(parts) or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {text}: expected different whole numbers with commas between, such as 0,1,2")
    return seeds


def seeds_of(root: Path) -> list[int]:
    """The seeds of an earlier call, if the folder is that of several runs."""
    return [] if (root / CONFIG_FILE).exists() else [int(path.parent.name[5:]) for path in configs_of_seeds(root)]


def run_seeds(config: Config, root: Path, seeds: Sequence[int], until: str | None = None) -> FinishedSeeds | None:
    """Runs each seed in `<root>/seed-<seed>`, or goes on where an earlier call ended; arguments as of `pipeline.run`.

    What does not depend on the seed, such as the features of the frozen backbone, is made by the first and linked into
    the folders of the others.

    Raises:
        ValueError: there is no seed, the folder is that of a single run, or as of `pipeline.run`.
        Terminated: as of `pipeline.run`.
    """
    if not seeds:
        raise ValueError("seeds: expected one at least")
    root = root.expanduser()
    if (bucket := bucket_of(root)) is not None:
        raise ValueError(f"--seeds with out={bucket.url}: the seeds link to each other's files; expected a directory")
    if (root / CONFIG_FILE).exists() or (root / "report").is_symlink():
        raise ValueError(f"{root} is the directory of a single run; expected another one for runs of several seeds")
    shards = config.data.shards_dir or str((root / "shards").absolute())  # images of folders become shards once
    data = config.data if config.data.collection else config.data.model_copy(update={"shards_dir": shards})
    found: dict[int, Finished] = {}
    for number, seed in enumerate(seeds):
        own = config.model_copy(update={"seed": seed, "data": data})
        if number:
            _share(_folder(root, seeds[0]), _folder(root, seed), own)
        finished = run(own, _folder(root, seed), until)
        if finished is not None:
            found[seed] = finished
    if until is not None:
        return None
    labelled = {seed: (one.queries, one.verdict) for seed, one in found.items() if one.verdict is not None}
    verdict = verdict_over(labelled) if labelled else None
    rows = {seed: one.rows for seed, one in found.items()}
    with Store(root / "report").lock():  # not of the folder itself, which would look like a single run
        write_json(root / "report" / "metrics.json", seeds_json(rows, verdict))
        write_utf8(root / "report" / "report.html", seeds_page(config.name, rows, verdict))
        Store(root).point("model", f"{_folder(root, seeds[0]).name}/model")
    return FinishedSeeds(root, found, verdict)


def _folder(root: Path, seed: int) -> Path:
    return root / f"seed-{seed}"


def _share(first: Path, other: Path, config: Config) -> None:
    """Links what another seed's run would make alike: generated images, index, features and scores of the backbone."""
    store = Store(other)
    _link_all(first, generated_artifacts(store, config.data))
    for path in (first / "index").rglob("*"):
        target = other / "index" / path.relative_to(first / "index")
        if path.is_file() and not target.exists():
            make_folder(target.parent)
            _link(path, target)
    inputs = look(config, other)
    if not inputs.missing and is_generated(config.data, store):
        train, test = open_images(inputs.config.data, store, config.resources, write_index=False)
        _link_all(first, artifacts_of(lay_out(inputs.config, store, train, test)))


def _link_all(first: Path, artifacts: Iterable[Artifact]) -> None:
    """Links those that are finished in `first` and not begun here; equal names hold equal bytes."""
    for artifact in artifacts:
        made = Artifact(first, artifact.kind, artifact.settings, artifact.inputs, artifact.fingerprint)
        if made.complete and not artifact.path.exists() and not artifact.partial.exists():
            fetched = artifact.path.with_name(f"{artifact.path.name}.fetched")  # as `clean` knows it
            remove_folder(fetched)
            make_folder(fetched.parent)
            shutil.copytree(made.path, fetched, copy_function=_link)
            rename(fetched, artifact.path)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
