"""`grappa-dist run`: from images to a model and a report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from grappa_dist.cli.verb import OneOf, split_words, verb, words
from grappa_dist.console import Ending, event_line, print_end
from grappa_dist.extras import RUNS, require
from grappa_dist.output import choose_mode, mode, printable

if TYPE_CHECKING:
    from grappa_dist.config import Config

STAGES = ("embed", "pseudo_label", "adapt", "fuse")
SPLITS = ("test", "none", "classes", "folders")  # defaults.Split, as that module takes seconds to import


@verb(
    "run",
    examples=[
        "grappa-dist run photos/ --out runs/mine",
        "grappa-dist run photos/ --test labelled/ --out runs/mine adapt.epochs=4",
        "grappa-dist run --out runs/mine                  # goes on with that run",
        "grappa-dist run photos/ --out runs/mine --seeds 0,1,2",
        "grappa-dist run --config mine.yaml --out runs/mine",
    ],
)
@words("given", "[IMAGES]...")
@click.option("--out", metavar="DIR", help="The run directory (default: runs/ and the name of the images' folder).")
@click.option("--test", multiple=True, metavar="IMAGES", help="Labelled images to score on. May be repeated.")
@click.option(
    "--split",
    type=OneOf(SPLITS),
    help="Which images test, without --test. classes: the second half of the class folders; folders: test/ or val/ "
    "beside train/; test: all of them, which train as well; none. Default: folders, else classes, else none.",
)
@click.option("--backbone", metavar="NAME", help="timm:<model> or <module>:<function> (default: a ViT-S/16 by DINO).")
@click.option("--config", metavar="FILE", help="A YAML file with all settings, in place of images and defaults.")
@click.option("--dry-run", is_flag=True, help="Print the plan, and what it takes; write nothing.")
@click.option("--until", type=OneOf(STAGES), help="End after this stage, without a report.")
@click.option("--seeds", metavar="0,1,2", help="A run for each, in DIR/seed-<seed>, and a verdict over all.")
@click.option("--quiet", is_flag=True, help="Show warnings, errors and the end only.")
@click.option("--json", is_flag=True, help="Show an object a line on stdout, as in events.jsonl.")
def command(
    ending: Ending, given: tuple[str, ...], dry_run: bool, until: str | None, seeds: str | None, **options: Any
) -> None:
    """Adapts a model to images: a folder, shards, or a list. Called again, it goes on or reuses what is there.

    The settings suit the number of images and this machine, and are kept in the run directory. Any other is given as
    section.key=value.
    """
    choose_mode(quiet=options.pop("quiet"), json=options.pop("json"))
    if seeds and dry_run:
        raise click.UsageError("--seeds: the plan of each run is that of one; leave it out, or leave out --dry-run")
    if not dry_run:
        require(*RUNS)  # before any setting is chosen
    config, root = settings_from(given, **options)
    if dry_run:
        from grappa_dist.plan import plan

        print(printable(plan(config, root, measured=True)))
        return
    from grappa_dist.pipeline import run
    from grappa_dist.seeds import parse_seeds, run_seeds, seeds_of

    ending.log_dir = root
    several = parse_seeds(seeds) if seeds else seeds_of(root)
    finished = run_seeds(config, root, several, until) if several else run(config, root, until)
    print_end(finished, until)


def settings_from(
    given: tuple[str, ...],
    config: str | None,
    out: str | None,
    test: tuple[str, ...] = (),
    split: Any = None,
    backbone: str | None = None,
) -> tuple[Config, Path]:
    """The settings of a run of images, or of a config, and its directory; says what was chosen."""
    from grappa_dist.config import expanded, load
    from grappa_dist.defaults import settings_of_run
    from grappa_dist.stages.run import name_after, placed, run_root

    places, overrides = split_words(given)
    if config is not None:
        if places or test or split:
            raise click.UsageError("--config FILE names the images (data.train, data.test): give no others beside it")
        named = [f"backbone.name={backbone}"] if backbone else []
        found = load(config, [*named, *overrides])
        return found, run_root(expanded(out, "--out") if out else found.out, found.name, found.resources)
    images = [expanded(place, "IMAGES") for place in places]
    if not images and out is None:
        raise click.UsageError("expected images, or --out DIR of a run that has begun, or --config FILE")
    root = run_root(expanded(out, "--out") if out else None, name_after(images))
    settings = settings_of_run(
        images,
        root,
        test=[expanded(path, "--test") for path in test],
        split=split,
        backbone=backbone,
        overrides=overrides,
        log=_say,
    )
    return settings, placed(root, settings.resources)


def _say(line: str) -> None:
    """Shows what was chosen, as the mode has it."""
    if mode() == "json":
        print(event_line("log", text=line, warning=False), flush=True)
    elif mode() != "quiet":
        print(printable(line), file=sys.stderr)
