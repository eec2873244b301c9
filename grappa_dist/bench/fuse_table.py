"""Findings of `fuse` as text for a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grappa_dist.bench.fuse import OURS, Found, FuseFindings, FuseSettings
from grappa_dist.bench.table import aligned, aligned_header
from grappa_dist.bench.timing import Timing

_MIB = 2**20


def as_text(header: dict[str, str], settings: FuseSettings, findings: FuseFindings) -> str:
    s = settings
    sizes = f"B={s.batch}, T={s.tokens}, D={s.dim}, N={s.sets}, H={s.bottleneck}"
    titles = {"adaptors and fusion alone": findings.layer, f"{s.depth} whole ViT blocks": findings.model}
    blocks = [aligned_header({**header, "sizes": sizes, "devices": "CPU alone"})]
    blocks += [_side_by_side(title, found) for title, found in titles.items()]
    end = f"ours and literal differ by at most {findings.apart:.1e} of the largest value, in output and gradients"
    return "\n\n".join([*blocks, end])


def _side_by_side(title: str, found: Sequence[Found]) -> str:
    lines = [[title, "forward, ms", "ratio", "forward+backward, ms", "ratio", "kept, MiB", "ratio"]]
    ours = next(f for f in found if f.name == OURS)
    for side in found:
        ratios = _ratios(side, ours)
        numbers = (1000 * _least(side.forward), 1000 * _least(side.both), side.kept / _MIB)
        cells = [
            c
            for n, r in zip(numbers, ratios.values(), strict=True)
            for c in (f"{n:.1f}", "" if side is ours else f"{r:.2f}")
        ]
        lines.append([side.name, *cells])
    return aligned(lines)


def _least(timing: Timing) -> float:
    return min(timing.runs)


def _ratios(side: Found, ours: Found) -> dict[str, float]:
    """A judge over ours: above 1, ours is faster or keeps less."""
    return {
        "forward": _least(side.forward) / _least(ours.forward),
        "forward_backward": _least(side.both) / _least(ours.both),
        "kept": side.kept / max(1, ours.kept),
    }


def as_json(header: dict[str, str], settings: FuseSettings, findings: FuseFindings) -> dict[str, Any]:
    def plain(found: Sequence[Found]) -> list[dict[str, Any]]:
        ours = next(f for f in found if f.name == OURS)
        return [
            {
                "name": f.name,
                "forward_s": f.forward.runs,
                "forward_backward_s": f.both.runs,
                "kept_bytes": f.kept,
                "ratio": _ratios(f, ours),
            }
            for f in found
        ]

    return {
        "machine": header,
        "settings": vars(settings),
        "layer": plain(findings.layer),
        "model": plain(findings.model),
        "largest_difference": findings.apart,
    }
