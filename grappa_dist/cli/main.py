"""The command `grappa-dist` and its verbs. A verb's module is imported when it is called, so that help comes at once.

The library is click: Ray brings it, verbs load lazily, completion for bash, zsh and fish and suggestions for misspelt
names come with it. Settings are no options but `section.key=value`, checked by the schema of config.py: each can be
reached, and none is declared twice.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

import click

from grappa_dist import __version__
from grappa_dist.output import guard_output, printable_line, suggestion, without_secrets

VERBS = {
    "run": "Adapt a model to a folder of images: shards, embeddings, training, scores and a report.",
    "shards": "Make WebDataset shards of images in folders, tars or lists.",
    "embed": "Embed images with an adapted model.",
    "search": "Find the images that look most like a query.",
    "serve": "Show a page that searches by an image, under backbone and adapted model side by side.",
    "evaluate": "Score a model on labelled images, beside its backbone.",
    "tables": "Print the paper's tables with the scores of a run beside the published figures.",
    "export": "Write a model as a folder for load_model or the Hub, as ONNX, or for torch.export.",
    "duplicates": "List images that are nearly the same, or far from all others.",
    "map": "Draw the embeddings of images as a page, backbone and adapted model side by side.",
    "status": "Show how far a run is, from another terminal.",
    "plan": "Show what a run would do, how long it would take and what it needs.",
    "check": "Check the artefacts of a run.",
    "doctor": "Look at this machine: what is installed, what is missing, what that means.",
    "clean": "List, or remove, what no result of a run needs.",
    "bench": "Measure this machine: how fast it decodes, embeds and trains.",
}
_COMPLETION = """\b
Completion of verbs and options, for bash (zsh and fish likewise):
  eval "$(_GRAPPA_DIST_COMPLETE=bash_source grappa-dist)"
"""


class _Verbs(click.Group):
    """Verbs by name, each the `command` of its module; listing them imports none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in VERBS if find_spec(f"grappa_dist.cli.{name}")]

    def get_command(self, ctx: click.Context, name: str) -> click.Command:
        known = self.list_commands(ctx)
        if name not in known:
            raise click.UsageError(f"there is no verb {name!r}{suggestion(name, known)}", ctx)
        found: click.Command = import_module(f"grappa_dist.cli.{name}").command
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, VERBS[name]) for name in self.list_commands(ctx)])


def _print_versions(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from grappa_dist.doctor import versions

        for name, found in versions(__version__).items():
            print(printable_line(f"{name:<12} {found}"))
        ctx.exit()


@click.group(
    cls=_Verbs,
    subcommand_metavar="VERB ...",
    invoke_without_command=True,
    epilog=_COMPLETION,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_versions,
    help="Print versions of this package and of what it uses, for bug reports.",
)
@click.pass_context
def group(ctx: click.Context) -> None:
    """One image-retrieval model, adapted from a frozen vision transformer with unlabelled images.

    \b
    grappa-dist run photos/ --out runs/mine     adapts a model to a folder of images
    grappa-dist VERB --help                     says what a verb does, with examples
    """
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


def main(args: Sequence[str] | None = None) -> int:
    """Runs a verb; the exit status."""
    guard_output()
    try:
        status = group.main(args, prog_name="grappa-dist", standalone_mode=False)
    except click.ClickException as error:
        return _refused(error)
    except click.Abort:  # Ctrl-C before the verb began
        return 130
    return status if isinstance(status, int) else 0


def _refused(error: click.ClickException) -> int:
    """Prints one line for arguments that are wrong; the exit status."""
    text = printable_line(without_secrets(" ".join(error.format_message().split())))
    context = getattr(error, "ctx", None)
    hint = f" ({context.command_path} --help)" if context is not None else ""
    print(f"error: {text}{hint}", file=sys.stderr)
    return error.exit_code
