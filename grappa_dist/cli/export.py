"""`grappa-dist export`: any model of a finished run as a folder of its own, or in a format of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from grappa_dist.cli.verb import OneOf, verb
from grappa_dist.cli.with_model import gallery_weights, places_of, strength_option, trust_modules
from grappa_dist.console import Ending
from grappa_dist.output import printable

if TYPE_CHECKING:
    from grappa_dist.formats.convert import Wanted

_FORMATS = ("onnx", "torch", "safetensors", "hub-folder")  # formats.convert has them, and imports torch
_OF_FORMATS = {"dtype": "fp32", "gallery": None, "check_images": (), "check_count": None}  # and their defaults


@verb(
    "export",
    examples=[
        "grappa-dist export runs/mine",
        "grappa-dist export runs/mine --name k=128 --out models/birds",
        "grappa-dist export runs/mine --name average --to onnx --out models/average.onnx",
        "grappa-dist export models/birds --to torch --dtype fp16 --out models/birds.pt2",
        "grappa-dist export runs/mine --to hub-folder --out models/for-the-hub",
        "grappa-dist export runs/mine --name average --strength 0.5 --out models/half",
    ],
)
@click.argument("source", metavar="RUN|MODEL")
@click.option("--name", metavar="MODEL", help="As in the table of scores: a variant, k=<K> or backbone.")
@click.option("--out", metavar="PATH", help="The new folder; of onnx and torch the new file.")
@click.option(
    "--to", type=OneOf(_FORMATS), help="onnx: for onnxruntime; torch: for torch.export.load; else a folder (default)."
)
@click.option(
    "--dtype", type=OneOf(["fp32", "fp16", "bf16"]), default="fp32", show_default=True, help="Of the weights."
)
@gallery_weights()
@strength_option
@click.option(
    "--check-images",
    multiple=True,
    metavar="PLACE",
    help="Images to compare embeddings on, a folder, a list or shards; by default they are generated.",
)
@click.option("--check-count", type=click.IntRange(1), metavar="N", help="At most so many of them (default: 1,000).")
@trust_modules
def command(
    ending: Ending, source: str, name: str | None, out: str | None, to: str | None, trust_modules: bool | None,
    **options: Any,
) -> None:  # fmt: skip
    """Writes a model of a run as a folder that grappa_dist.load_model reads, or with --to in another format, which
    it compares with the model and refuses where it differs. Without --name and --to, lists the models of a run.

    RUN is a run directory, MODEL the folder of an exported model; neither is changed. Of a run without --name, --to
    takes the model that the run exported.
    """
    from grappa_dist.config import expanded
    from grappa_dist.run_models import export_from_run, models_of

    root = Path(expanded(source, "RUN|MODEL"))
    if to is None:
        if given := next((key for key, default in _OF_FORMATS.items() if options[key] != default), None):
            raise click.UsageError(f"--{given.replace('_', '-')} goes with --to")
        if (name is None) != (out is None):
            raise click.UsageError("--name and --out go together, unless there is --to")
        if name is None or out is None:
            if options["strength"] is not None:
                raise click.UsageError("--strength goes with --name and --out, or with --to")
            print(printable("\n".join(models_of(root))))
            return
        target = Path(expanded(out, "--out")).absolute()
        how: dict[str, Any] = {"trust_modules": trust_modules, "strength": options["strength"]}
        print(printable(f"model   {export_from_run(root, name, target, **how)}"))
        return
    if out is None:
        raise click.UsageError(f"--to {to} needs --out, the {'file' if to in ('onnx', 'torch') else 'folder'} to write")
    from grappa_dist.formats.convert import convert

    convert(
        root,
        Path(expanded(out, "--out")).absolute(),
        _wanted(to, name, trust_modules, options),
        lambda line: print(printable(line), flush=True),
    )


def _wanted(to: str, name: str | None, trust_modules: bool | None, options: dict[str, Any]) -> Wanted:
    from grappa_dist.formats.checking import CHECK_IMAGES
    from grappa_dist.formats.convert import Wanted

    return Wanted(
        to,  # type: ignore[arg-type]  # one of _FORMATS
        name,
        options["dtype"],
        options["gallery"],
        places_of(options["check_images"], "--check-images"),
        options["check_count"] or CHECK_IMAGES,
        trust_modules,
        options["strength"],
    )
