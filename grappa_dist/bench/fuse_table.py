"""Findings of `fuse` as text for a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.fuse import OURS, Found, FuseFindings, FuseSettings
from grappa_dist.bench.table import aligned, aligned_header

_MIB = 2**20


def as_text(header: dict[str, str], settings: FuseSettings, findings: FuseFindings) -> str:
    s = settings
    device = "CPU alone" if s.device == "cpu" else f"{torch.cuda.get_device_name()}, bfloat16 by autocast"
    sizes = f"B={s.batch}, T={s.tokens}, D={s.dim}, N={s.sets}, H={s.bottleneck}"
    titles = {"adaptors and fusion alone": findings.layer, f"{s.depth} whole ViT blocks": findings.model}
    blocks = [aligned_header({**header, "sizes": sizes, "devices": device})]
    blocks += [_side_by_side(title, found) for title, found in titles.items()]
    apart = f"{findings.apart:.1e} of the largest value"
    end = f"ours and literal differ by at most {apart}, in output and gradients (float32)"
    return "\n\n".join([*blocks, end])


def _side_by_side(title: str, found: Sequence[Found]) -> str:
    heads = [
        title,
        "forward, ms",
        "ratio",
        "CPU ratio",
        "forward+backward, ms",
        "ratio",
        "CPU ratio",
        "kept, MiB",
        "ratio",
    ]
    lines, ours = [heads], next(f for f in found if f.name == OURS)
    for side in found:
        ratio = {name: "" if side is ours else f"{value:.2f}" for name, value in _ratios(side, ours).items()}
        lines.append(
            [
                side.name,
                f"{1000 * min(side.forward.runs):.1f}",
                ratio["forward"],
                ratio["forward_cpu"],
                f"{1000 * min(side.both.runs):.1f}",
                ratio["forward_backward"],
                ratio["forward_backward_cpu"],
                f"{side.kept / _MIB:.1f}",
                ratio["kept"],
            ]
        )
    return aligned(lines)


def _ratios(side: Found, ours: Found) -> dict[str, float]:
    """A judge over ours: above 1, ours is faster or keeps less."""
    return {
        "forward": min(side.forward.runs) / min(ours.forward.runs),
        "forward_cpu": min(side.forward.cpu_runs) / min(ours.forward.cpu_runs),
        "forward_backward": min(side.both.runs) / min(ours.both.runs),
        "forward_backward_cpu": min(side.both.cpu_runs) / min(ours.both.cpu_runs),
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
                "forward_cpu_s": f.forward.cpu_runs,
                "forward_backward_cpu_s": f.both.cpu_runs,
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
