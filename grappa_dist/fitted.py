"""A run from Python: `grappa_dist.fit("photos/", out="runs/mine")` does what `grappa-dist run` does.

Returns when all is done; called again it goes on, or reuses what is there.
"""

from __future__ import annotations

import html
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PosixPath
from typing import TYPE_CHECKING, Any

from grappa_dist.config import Config
from grappa_dist.console import Interrupted, Terminated
from grappa_dist.defaults import Split, as_overrides, settings_of_run
from grappa_dist.extras import RUNS, require
from grappa_dist.output import printable, quietly
from grappa_dist.pipeline import Finished, run
from grappa_dist.report.content import ScoreRow
from grappa_dist.stages.run import name_after, placed, run_root
from grappa_dist.verdict import Verdict

if TYPE_CHECKING:
    from grappa_dist.export import RetrievalModel

PAGE_HEIGHT = 800  # pixels, of a report in a notebook
StrPath = str | os.PathLike[str]


def fit(
    images: StrPath | Iterable[StrPath] = (),
    out: StrPath | None = None,
    *,
    backbone: str | None = None,
    test: StrPath | Iterable[StrPath] = (),
    split: Split | None = None,
    settings: Mapping[str, Any] | None = None,
    quiet: bool = False,
    **sections: Any,
) -> FittedRun:
    """Adapts a model to images, and returns when all is done.

    Args:
        images: a folder of images, or several; lists and shards too. May be left out where `out` is a run directory.
        out: the run directory, whose settings hold but for those given here; None: runs/<name of the images' folder>.
        backbone: timm:<model> or <module>:<function>.
        test: images to score on; by default those that the folders name, or half of the classes.
        split: test, none, classes or folders: which images test.
        settings: any of docs/settings.md, {"adapt.epochs": 5} or {"adapt": {"epochs": 5}}.
        quiet: whether nothing but warnings and errors is shown.
        sections: settings as well: adapt={"epochs": 5}, seed=1.

    Raises:
        ValueError: an argument, a setting or an input is wrong; the message is that of the command.
        KeyboardInterrupt: after Ctrl-C; state is saved, and the same call goes on.
    """
    require(*RUNS)
    photos, root = _places(images, out)
    with quietly(quiet):
        config = settings_of_run(
            photos,
            root,
            test=_paths(test),
            split=split,
            backbone=backbone,
            overrides=as_overrides({**(settings or {}), **sections}),
            log=lambda line: None if quiet else print(printable(line), file=sys.stderr),
        )
        return _run(config, placed(root, config.resources))


def _places(images: StrPath | Iterable[StrPath], out: StrPath | None) -> tuple[Sequence[str], Path]:
    """The images and the run directory."""
    photos = _paths(images)
    if not photos and out is None:
        raise ValueError("expected images, or out=... of a run that has begun")
    return photos, run_root(None if out is None else os.fspath(out), name_after(photos))


def _run(config: Config, root: Path) -> FittedRun:
    try:
        finished = run(config, root)
    except Interrupted as stopped:
        raise KeyboardInterrupt("state is saved; the same call goes on") from stopped
    except Terminated as stopped:
        raise RuntimeError("terminated; the same call goes on") from stopped
    assert finished is not None  # no stage was asked for to end after
    return FittedRun(root, finished)


def _paths(given: StrPath | Iterable[StrPath]) -> Sequence[str]:
    paths = [given] if isinstance(given, str | os.PathLike) else given
    return [os.path.expanduser(os.fspath(path)) for path in paths]


@dataclass(frozen=True)
class FittedRun:
    """What a run has come to. Printing it shows what the command prints at its end."""

    root: Path  # the run directory
    finished: Finished = field(repr=False)

    @cached_property
    def model(self) -> RetrievalModel:
        """The exported model, on the CPU: RGB images (B, 3, S, S) -> unit embeddings (B, D)."""
        from grappa_dist.export import load_model

        return load_model(self.root)

    @property
    def scores(self) -> list[ScoreRow]:
        """A row per model and task; empty without labelled test images."""
        return self.finished.rows

    @property
    def report(self) -> ReportPage:
        """The path of report.html; a notebook shows the page."""
        return ReportPage(self.finished.report / "report.html")

    @property
    def verdict(self) -> Verdict | None:
        """Whether the model is better than the backbone, and how sure that is; None without labelled test images."""
        return self.finished.verdict

    def __str__(self) -> str:
        return printable(self.finished.text())


class ReportPage(PosixPath):
    """A path to a page that a notebook shows in a frame."""

    def _repr_html_(self) -> str:
        page = html.escape(self.read_text(encoding="utf-8"))
        style = f"width:100%;height:{PAGE_HEIGHT}px;border:0"
        return f'<iframe srcdoc="{page}" sandbox style="{style}"></iframe>'
