"""Findings as text for a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.kmeans import SAME_OBJECTIVE, Comparison, KMeansFindings, Seeding, Side
from grappa_dist.bench.scaling import MORE_ROWS, Memory, Scaling

_NONE = "-"
_MIB = 2**20


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns side by side: names to the left, numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    name, *numbers = widths
    padded = ([line[0].ljust(name), *map(str.rjust, line[1:], numbers)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def as_text(header: dict[str, str], findings: KMeansFindings) -> str:
    blocks = [aligned_header({**header, "rows": f"{findings.source}, {findings.shape[1]} dimensions"})]
    blocks += [_comparison(comparison) for comparison in findings.comparisons]
    blocks += [_seedings(findings.seedings)] if findings.seedings else []
    ends = [_scaling(scaling) for scaling in findings.scalings]
    ends.append(_memory(findings.memory) if findings.memory else "memory: not measured, there is no /proc here")
    return "\n\n".join([*blocks, "\n".join(ends)])


def aligned_header(header: dict[str, str]) -> str:
    width = max(len(name) for name in header)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in header.items())


def _comparison(found: Comparison) -> str:
    titles = ["seconds", "judge/ours", "CPU s", "CPU ratio", "updates", "objective", "ours worse by"]
    titles += ["decided exactly", "searched"]
    lines = [[f"K={found.num_labels}", *titles], _line(found, found.ours)]
    lines += [_line(found, judge) for judge in found.judges]
    flagged = [judge.name for judge in found.judges if abs(found.difference(judge)) > SAME_OBJECTIVE]
    notes = [f"!! objectives differ by more than {SAME_OBJECTIVE:.1%}: {', '.join(flagged)}"] if flagged else []
    return "\n".join([aligned(lines), *notes, verdict(found)])


def verdict(found: Comparison) -> str:
    ratio = found.ratio(found.fastest)
    return f"K={found.num_labels}: ours {ratio:.{1 if ratio >= 1 else 2}f}x the faster judge ({found.fastest.name})"


def _line(found: Comparison, side: Side) -> list[str]:
    own = side is found.ours
    return [
        side.name,
        f"{side.timing.seconds:.3f}",
        _NONE if own else f"{found.ratio(side):.2f}",
        f"{side.timing.cpu:.3f}",
        _NONE if own else f"{found.cpu_ratio(side):.2f}",
        str(side.iterations),
        f"{side.objective:.6g}",
        _NONE if own else f"{found.difference(side):+.4%}",
        _NONE if side.exact_share is None else f"{side.exact_share:.3%}",
        _NONE if side.searched_share is None else f"{side.searched_share:.1%}",
    ]


def _seedings(seedings: list[Seeding]) -> str:
    lines = [["first centroids", "", "seconds", "time/first", "objective"]]
    for found in seedings:
        first = next(iter(found.ways.values())).seconds
        lines += [
            [
                f"K={found.num_labels}",
                way,
                f"{drawn.seconds:.3f}",
                _ratio(drawn.seconds, first),
                f"{drawn.objective:.6g}",
            ]
            for way, drawn in found.ways.items()
        ]
    return aligned(lines)


def _ratio(above: float, below: float) -> str:
    return f"{above / below:.2f}" if below > 0 else _NONE


def _scaling(found: Scaling) -> str:
    return (
        f"K={found.num_labels}: {found.workers} workers {found.several.seconds:.3f} s, 1 worker "
        f"{found.one.seconds:.3f} s, a thread each: {found.speedup:.2f}x "
        f"({found.several.cpu:.3f} and {found.one.cpu:.3f} s of CPU)"
    )


def _memory(found: Memory) -> str:
    return (
        f"K={found.num_labels}: one worker grew by {found.growth / _MIB:.1f} MiB at {found.rows} mapped rows, by "
        f"{found.more_growth / _MIB:.1f} MiB at {MORE_ROWS} times as many: {found.per_row:.0f} bytes per further row"
    )


def as_json(header: dict[str, str], findings: KMeansFindings) -> dict[str, Any]:
    return {
        "machine": header,
        "rows": {"source": findings.source, "rows": findings.shape[0], "dim": findings.shape[1]},
        "kmeans": [_comparison_json(found) for found in findings.comparisons],
        "seeding": [asdict(found) for found in findings.seedings],
        "scaling": [
            {
                "num_labels": found.num_labels,
                "workers": found.workers,
                "one_s": found.one.runs,
                "several_s": found.several.runs,
                "one_cpu_s": found.one.cpu_runs,
                "several_cpu_s": found.several.cpu_runs,
                "speedup": found.speedup,
            }
            for found in findings.scalings
        ],
        "memory": {**vars(findings.memory), "bytes_per_row": findings.memory.per_row} if findings.memory else None,
    }


def _comparison_json(found: Comparison) -> dict[str, Any]:
    return {
        "num_labels": found.num_labels,
        "exact_share": found.ours.exact_share,
        "searched_share": found.ours.searched_share,
        "sides": [_side_json(side) for side in (found.ours, *found.judges)],
        "ratio": {judge.name: found.ratio(judge) for judge in found.judges},
        "cpu_ratio": {judge.name: found.cpu_ratio(judge) for judge in found.judges},
        "objective_difference": {judge.name: found.difference(judge) for judge in found.judges},
        "faster_judge": found.fastest.name,
        "ratio_to_faster_judge": found.ratio(found.fastest),
    }


def _side_json(side: Side) -> dict[str, Any]:
    return {
        "name": side.name,
        "runs_s": side.timing.runs,
        "seconds": side.timing.seconds,
        "cpu_runs_s": side.timing.cpu_runs,
        "updates": side.iterations,
        "objective": side.objective,
    }
