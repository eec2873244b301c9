"""What is said of one clustering: the statistics beside its labels, and the shortcuts that it took, in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from grappa_dist.files import write_json
from grappa_dist.kmeans.methods import Clustering
from grappa_dist.ops.choice import Choice
from grappa_dist.report.content import size_histogram

STATS_FILE = "stats.json"
LEAST_AGREEMENT = 0.95  # of labels found through lists with the exact ones; below, a warning


def write_stats(folder: Path, k: int, found: Clustering, choice: Choice) -> None:
    """Writes what a person can judge the clustering by, for console and report."""
    result, counts = found.result, found.result.counts
    agreement, balanced = found.agreement, found.balanced
    stats = {
        "k": k,
        "inertia": result.inertia,
        "sizes": size_histogram(counts),
        "largest": int(counts.max()),
        "median": float(np.median(counts)),
        "imbalance": float(k * np.square(counts.astype(float)).sum() / counts.sum() ** 2),
        "empty_repaired": result.empty_repaired,
        "empty_left": result.empty_left,
        "singletons_share": float((counts == 1).mean()),
        "exact_share": result.exact_share,
        "searched_share": result.searched_share,
        "method": choice.name,
        "reason": choice.reason,
        "updates": found.updates,
        "sampled_share": found.sampled_rows / int(counts.sum()),
        "agreement": agreement.share if agreement else None,
        "agreement_rows": agreement.rows if agreement else 0,
        "bound": balanced.largest if balanced else None,
        "moved": balanced.moved if balanced else 0,
        "unbalanced_inertia": found.unbalanced_inertia,
        "restarts": list(found.restarts),
    }
    write_json(folder / STATS_FILE, stats)


def shortcuts_in_words(stats: Mapping[str, Any]) -> list[str]:
    """What the shortcuts of one clustering came to, none where it took none."""
    lines = []
    if stats["sampled_share"] < 1:
        lines.append(f"centroids were fitted to a sample of {100 * stats['sampled_share']:.3g} % of the rows")
    agreement = stats["agreement"]
    if agreement is not None:
        rows = stats["agreement_rows"]
        lines.append(f"labels agree with the exact ones on {100 * agreement:.2f} % of {rows} rows drawn")
        if agreement < LEAST_AGREEMENT:
            lines[-1] += f", WARNING: less than {100 * LEAST_AGREEMENT:.0f} %, raise clustering.probes"
    if stats["bound"] is not None:
        more = stats["inertia"][-1] - stats["unbalanced_inertia"]
        lines.append(
            f"{stats['moved']} rows moved, no cluster has more than {stats['bound']}; "
            f"inertia {stats['inertia'][-1]:.6g}, of which {more:.3g} for that"
        )
    return lines
