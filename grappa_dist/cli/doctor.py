"""`grappa-dist doctor`: what this machine has, and what that means."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from grappa_dist.cli.verb import verb
from grappa_dist.console import FAILED, Ending
from grappa_dist.output import printable, without_secrets


@verb(
    "doctor",
    examples=["grappa-dist doctor", "grappa-dist doctor --out /data/runs --start-ray", "grappa-dist doctor --json"],
    statuses="Exit status: 0 runs are possible here, 1 they are not as it is, 2 an argument is wrong.",
)
@click.option("--out", default="runs", metavar="DIR", help="Where runs would go (default: runs).")
@click.option("--start-ray", is_flag=True, help="Start a Ray on this machine, and end it: some ten seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def command(ending: Ending, out: str, start_ray: bool, as_json: bool) -> int:
    """Looks at this machine and says what it means for runs: ok, warning, or missing with the line that installs it.

    Versions, GPUs, image formats, Ray, memory, disk and limits. Changes nothing and compiles nothing.
    """
    from grappa_dist.config import expanded
    from grappa_dist.doctor import describe, examine

    findings = examine(Path(expanded(out, "--out")), start_ray=start_ray)
    text = json.dumps([asdict(finding) for finding in findings], indent=1) if as_json else describe(findings)
    print(printable(without_secrets(text)))
    return FAILED if any(finding.stops_runs for finding in findings) else 0
