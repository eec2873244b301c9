"""The table of trials for docs/reliability.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from tests.faults.faults import FAULTS
from tests.faults.small_run import STAGES

HEAD = (
    "| fault | trials | went on | ended | results lost | seconds to notice | seconds to go on |",
    "|---|---|---|---|---|---|---|",
)
BEGIN, END = "<!-- trials: written by tests.faults.matrix -->\n", "<!-- end of trials -->\n"  # in a document


def table(trials: Sequence[Mapping[str, Any]]) -> str:
    """A row per fault, in the order of FAULTS, each stage, and one for all; seconds: the median and the most."""
    happened = [trial for trial in trials if trial["outcome"] != "missed"]
    rows = [_row(name, [t for t in happened if t["fault"] == name]) for name in FAULTS]
    rows += [_row(f"*any, in {stage}*", [t for t in happened if t["stage"] == stage]) for stage in STAGES]
    return "\n".join([*HEAD, *filter(None, rows), _row("**all**", happened)])


def written_into(document: str, trials: Sequence[Mapping[str, Any]], caption: str) -> str:
    """The document, with the caption and the table of these trials in place of those between its markers."""
    before, _, rest = document.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}{caption}\n\n{table(trials)}\n{END}{after}"


def lost(trial: Mapping[str, Any]) -> bool:
    """Whether the run ended with other bytes, or could not be finished."""
    return any(w.startswith(("differs", "has not ended well", "the next start")) for w in trial["wrong"])


def _row(name: str, trials: Sequence[Mapping[str, Any]]) -> str:
    if not trials:
        return ""
    outcomes = [trial["outcome"] for trial in trials]
    ended = len(outcomes) - outcomes.count("went on")
    counts = (len(trials), outcomes.count("went on"), ended, sum(map(lost, trials)))
    cells = (name, *map(str, counts), _seconds(trials, "noticed_s"), _seconds(trials, "recovered_s"))
    return f"| {' | '.join(cells)} |"


def _seconds(trials: Sequence[Mapping[str, Any]], key: str) -> str:
    values = [trial[key] for trial in trials if trial[key] is not None]
    return f"{median(values):.1f}, {max(values):.1f}" if values else "–"
