"""The figures as plain sentences, each a pair of its subject and the sentence.

Shapes: L layers, N adaptor sets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from grappa_dist.console import format_number, pluralize
from grappa_dist.report.html import percent, points
from grappa_dist.report.queries import ORACLE
from grappa_dist.report.scores import AVERAGE, Scores, is_learned, kind
from grappa_dist.variants import BACKBONE

Sentence = tuple[str, str]
UNIFORM = 0.99  # normalised entropy above which a learned fusion is practically the average
EVEN = 1.02  # a share of at most this many times 1/N is not named
MOST = 8  # items of a list within a sentence
MOST_TASKS = 24  # with a sentence of their own


def describe_gain(gain: float, than: str = "the backbone") -> str:
    """A difference of fractions, for example "1.2 points below the backbone"."""
    if round(100 * gain, 1) == 0:
        return f"within 0.1 points of {than}"
    return f"{percent(abs(gain))} points {'above' if gain > 0 else 'below'} {than}"


def read_scores(scores: Scores) -> list[Sentence]:
    """Which task gains, what falls below the backbone, and how far the best fusion is from the oracle."""
    found: list[Sentence | None] = [_task(scores, task) for task in scores.tasks[:MOST_TASKS]]
    found += [("Below the backbone", _below_backbone(scores)), _against_oracle(scores), _against_average(scores)]
    return [sentence for sentence in found if sentence is not None]


def _task(scores: Scores, task: str) -> Sentence:
    base = scores.value(BACKBONE, task)
    measured = {m: scores.value(m, task) for m in scores.models if math.isfinite(scores.value(m, task))}
    fusions = {m: v for m, v in measured.items() if kind(m) == "fusion"}
    sets = {m: v for m, v in measured.items() if kind(m) == "set"}
    if not measured:
        return task, "has no queries: no class of it has two images."
    parts = []
    if fusions:
        top = max(fusions, key=lambda m: fusions[m])
        over = describe_gain(scores.gain(top, task), f"the backbone's {percent(base)}")
        over = f", {over}" if math.isfinite(base) else ""
        parts.append(f"the best fusion, {top}, reaches {percent(fusions[top])}{over}")
    if sets:
        top = max(sets, key=lambda m: sets[m])
        over = f", {describe_gain(scores.gain(top, task))}" if math.isfinite(base) else ""
        parts.append(f"the best single set is {top} with {percent(sets[top])}{over}")
    if not parts:
        top = max(measured, key=lambda m: measured[m])
        parts.append(f"the best row is {top} with {percent(measured[top])}")
    return task, "; ".join(parts) + "."


def _below_backbone(scores: Scores) -> str:
    if BACKBONE not in scores.models:
        return "there is no backbone row to compare with."
    pairs = [(scores.gain(m, t), m, t) for m in scores.models for t in scores.tasks if m != ORACLE]
    below = sorted((p for p in pairs if round(100 * p[0], 1) < 0), key=lambda p: p[0])
    if not below:
        return "no row, on any task."
    named = [f"{model} on {task} by {percent(-gain)}" for gain, model, task in below[:MOST]]
    rest = f"; and {len(below) - MOST} more" if len(below) > MOST else ""
    return f"{'; '.join(named)}{rest} points."


def _against_oracle(scores: Scores) -> Sentence | None:
    lead = scores.leader("fusion")
    if lead is None or ORACLE not in scores.models:
        return None
    differences = {
        t: scores.gain(ORACLE, t, over=lead) for t in scores.tasks if math.isfinite(scores.gain(ORACLE, t, over=lead))
    }
    if not differences:
        return None
    mean = scores.gain(ORACLE, None, over=lead)  # as the tile has it
    mean = mean if math.isfinite(mean) else sum(differences.values()) / len(differences)
    worst = max(differences, key=lambda t: differences[t])
    if round(100 * differences[worst], 1) <= 0:
        return "Fusion and oracle", f"{lead} reaches the oracle or passes it on every task, without its labels."
    where = f", most on {worst} ({percent(differences[worst])})" if len(differences) > 1 else ""
    side = "above" if mean >= 0 else "below"
    return (
        "Fusion and oracle",
        f"the oracle, which picks each task's best set by labels, is {percent(abs(mean))} points {side} {lead}{where}.",
    )


def _against_average(scores: Scores) -> Sentence | None:
    """How the best learned fusion differs from the average, which learns nothing."""
    measured = [m for m in scores.models if math.isfinite(scores.value(m, None))]
    fusions = [m for m in measured if is_learned(m)]
    if not fusions or AVERAGE not in measured:
        return None
    lead = max(fusions, key=lambda m: scores.value(m, None))
    gains = {t: scores.gain(lead, t, over=AVERAGE) for t in scores.tasks}
    gains = {t: g for t, g in gains.items() if math.isfinite(g)}
    low, high = min(gains, key=lambda t: gains[t]), max(gains, key=lambda t: gains[t])
    if max(abs(g) for g in gains.values()) < 0.0025:
        return "Learned or average", f"{lead} is within a quarter of a point of the plain average on every task."
    if len(gains) == 1:
        return "Learned or average", f"{lead} is {describe_gain(gains[low], 'the plain average')}."
    return (
        "Learned or average",
        f"against the plain average, {lead} runs from {points(gains[low])} ({low}) to {points(gains[high])} ({high}).",
    )


def read_attention(
    groups: dict[str, list[list[float]]], entropy: list[float], sets: list[str], decay: Sequence[float] = ()
) -> list[Sentence]:
    """Whether a fusion's attention is uniform and why, the sets with the most attention, and how groups differ.

    Args:
        decay: of every layer, weight decay over gradient of Q and K in training, as norms.
    """
    found = [("In short", _uniformity(entropy))] if entropy else []
    found += _uniform_layers(entropy, decay)
    alike = {name: a for name, a in groups.items() if len({len(row) for row in a}) == 1}
    means = {name: np.asarray(a, dtype=np.float64) for name, a in alike.items()}  # (L, N)
    means = {name: a for name, a in means.items() if a.size and np.isfinite(a).all()}
    leanings = []
    for name, a in means.items():
        share = a.mean(0)  # (N,)
        top = int(share.argmax())
        if share[top] * len(share) > EVEN and top < len(sets):
            leanings.append(f"{name} on {sets[top]} ({share[top] * len(share):.2f} times an even share)")
    if leanings:
        more = f"; and {len(leanings) - MOST} more" if len(leanings) > MOST else ""
        found.append(("Leans most", "; ".join(leanings[:MOST]) + more + "."))
    elif means:
        found.append(("Leans most", "on no set: over the layers, every group gives every set about an even share."))
    tasks = [a for name, a in means.items() if name != "all"]
    if len(tasks) > 1 and len({a.shape for a in tasks}) == 1:
        spread = float((np.max(tasks, axis=0) - np.min(tasks, axis=0)).max())
        found.append(
            (
                "Tasks differ",
                f"by at most {spread:.3f} in any layer and set, where an even share is {1 / tasks[0].shape[1]:.3f}.",
            )
        )
    return found


def _uniform_layers(entropy: list[float], decay: Sequence[float]) -> list[Sentence]:
    """The uniform layers that had a gradient, and whether decay was stronger than the gradient there."""
    flat = [i for i, e in enumerate(entropy) if e > UNIFORM and i < len(decay) and math.isfinite(decay[i])]
    known = [decay[i] for i in flat]
    if not flat:
        return []
    layers = f"attention is uniform in {_layers(flat)}"
    if max(known) <= 1:
        return [
            ("Why", f"{layers}; decay of Q and K did not exceed their gradient there, so it is not what holds them.")
        ]
    over = [i for i, ratio in zip(flat, known, strict=True) if ratio > 1]
    ratios = [decay[i] for i in over]
    low, high = (format_number(ratio, 2) for ratio in (min(ratios), max(ratios)))
    times = f"{low} times" if low == high else f"{low} to {high} times"
    where = "" if over == flat else f" (in {_layers(over)})"
    return [("Why", f"{layers}: decay of Q and K is {times} their gradient{where}, in the median step.")]


def _layers(indices: list[int]) -> str:
    """Layers by number, from 1, consecutive ones as a range."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    parts = [str(r[0] + 1) if len(r) == 1 else f"{r[0] + 1} to {r[-1] + 1}" for r in runs]
    return ("layer " if len(indices) == 1 else "layers ") + ", ".join(parts)


def uniform(entropy: list[float]) -> bool:
    """Whether a fusion's attention is practically uniform in every layer."""
    return bool(entropy) and all(e > UNIFORM for e in entropy)


def _uniformity(entropy: list[float]) -> str:
    values = [e for e in entropy if math.isfinite(e)]
    if not values:
        return "has no finite entropy: its attention is broken."
    mean, flat = sum(values) / len(values), sum(e > UNIFORM for e in values)
    if flat == len(values):
        return (
            f"attention is practically uniform in every layer (normalised entropy {mean:.3f} on average, at least "
            f"{min(values):.3f}), so this learned fusion equals the average."
        )
    lowest = 1 + entropy.index(min(values))
    some = (
        f"practically uniform in {flat} of {pluralize(len(values), 'layer')}"
        if flat
        else "away from uniform in every layer"
    )
    least = f"lowest in layer {lowest} ({min(values):.3f})"
    return f"attention is {some}; normalised entropy is {mean:.3f} on average, {least}."
