"""What reading images cost, as text for a terminal and as JSON."""

from __future__ import annotations

from typing import Any

from benchmarks.data import OURS, DataFindings, ViewFindings
from grappa_dist.bench.table import aligned, aligned_header


def as_text(header: dict[str, str], findings: DataFindings) -> str:
    settings = findings.settings
    about = f"{settings.image_size} px, batches of {settings.batch}, medians of {settings.repeats} runs"
    blocks = [aligned_header({**header, "images": findings.source, "views": about})]
    return "\n\n".join([*blocks, *map(_view_text, findings.views)])


def _view_text(found: ViewFindings) -> str:
    lines = [[f"{found.view} views", "images/s", "images/CPU s", "ours/judge", "by CPU"]]
    for name, speed in found.speeds.items():
        own = name == OURS
        ratios = ["-", "-"] if own else [f"{found.ratio(name):.2f}", f"{found.cpu_ratio(name):.2f}"]
        lines.append([name, f"{speed.images_per_s:.0f}", f"{speed.images_per_cpu_s:.0f}", *ratios])
    return f"{aligned(lines)}\n{found.verdict}"


def as_json(header: dict[str, str], findings: DataFindings) -> dict[str, Any]:
    return {
        "machine": header,
        "images": findings.source,
        "views": [
            {
                "view": found.view,
                "sides": [
                    {
                        "name": speed.name,
                        "images": speed.rows,
                        "runs_s": speed.timing.runs,
                        "cpu_runs_s": speed.timing.cpu_runs,
                        "images_per_s": speed.images_per_s,
                        "images_per_cpu_s": speed.images_per_cpu_s,
                    }
                    for speed in found.speeds.values()
                ],
                "ratio": {judge: found.ratio(judge) for judge in found.speeds if judge != OURS},
                "cpu_ratio": {judge: found.cpu_ratio(judge) for judge in found.speeds if judge != OURS},
            }
            for found in findings.views
        ],
    }
