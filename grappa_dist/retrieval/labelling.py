"""A comparison of two models by somebody's answers: the questions about some images, and the result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from grappa_dist.console import pluralize
from grappa_dist.data.decoding import BadImage
from grappa_dist.make_shards.progress import align
from grappa_dist.output import printable_line
from grappa_dist.report.html import percent
from grappa_dist.retrieval.answer_file import VALUES, AnswerFile
from grappa_dist.retrieval.answers import (
    Comparison,
    Figure,
    Ids,
    Pair,
    Questions,
    answers_for,
    compare,
    questions_of,
    some_queries,
)
from grappa_dist.retrieval.nearest import Rows, nearest

if TYPE_CHECKING:
    from grappa_dist.retrieval.map_images import MapImages
    from grappa_dist.retrieval.sprites import Read

QUERIES = 4096  # images whose neighbours are compared, at most
_DIFFERENCES = (0.05, 0.02, 0.01)  # for which the answers needed are named
_OUTCOMES = {
    "better": "{model} is better",
    "worse": "{model} is worse",
    "equal": "they are equally good",
    "unsure": "not shown to be better or worse",
}


@dataclass(frozen=True)
class Labelling:
    """Two models, and what is asked about them."""

    models: tuple[str, str]  # the model, and the other one that it is compared with
    names: Sequence[str] = field(repr=False)  # (n,) different ones
    read: Read = field(repr=False)  # the file of an image, by its row
    questions: Questions = field(repr=False)
    pairs: Sequence[Pair] = field(repr=False)  # those that are asked, in order
    notes: Sequence[str] = ()  # sentences about images that take no part
    _known: dict[int, str] = field(default_factory=dict, repr=False)  # checksums by row

    def same(self, answers: AnswerFile) -> dict[Pair, float]:
        """The answers about the pairs that are asked."""
        given = {pair: self.answer(answers, pair) for pair in self.pairs}
        return {pair: VALUES[answer] for pair, answer in given.items() if answer is not None}

    def answer(self, answers: AnswerFile, pair: Pair) -> str | None:
        return answers.found.get(frozenset(self._sums(pair)))

    def add(self, answers: AnswerFile, pair: Pair, answer: str) -> None:
        """Keeps an answer."""
        answers.add([self.names[row] for row in pair], self._sums(pair), answer)

    def _sums(self, pair: Pair) -> list[str]:
        """The checksums of the files; of one that cannot be read its name."""
        for row in pair:
            if row not in self._known:
                data = self.read(row)
                self._known[row] = self.names[row] if isinstance(data, BadImage) else xxhash.xxh3_128_hexdigest(data)
        return [self._known[row] for row in pair]

    def result(self, answers: AnswerFile) -> Comparison | None:
        return compare(self.questions, self.same(answers))


def labelling_of(images: MapImages, most: int, k: int) -> Labelling:
    """What to ask about two models.

    Args:
        images: with the embeddings of the other model first.
        most: questions.
        k: neighbours of a query that count; fewer where there are fewer images.

    Raises:
        ValueError: there is one model, or one image.
    """
    if len(images.embeddings) != 2:
        (name,) = images.embeddings
        raise ValueError(
            f"--label compares two models, and {name} is the only one; name another one by --against, such as "
            "timm:NAME or a run directory"
        )
    if len(images.names) < 2:
        raise ValueError(f"{pluralize(len(images.names), 'image')} to compare the models on; expected at least 2")
    names = _different(images.names)
    queries = some_queries(names, QUERIES)
    (other, theirs), (model, mine) = images.embeddings.items()
    k = min(k, len(names) - 1)
    questions = questions_of(queries, neighbours_of(mine, queries, k), neighbours_of(theirs, queries, k), names)
    return Labelling((model, other), names, images.read, questions, questions.first(most), images.notes)


def _different(names: Sequence[str]) -> list[str]:
    """The names, with a number where an earlier image has the same one."""
    seen, found = Counter[str](), list[str]()
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


def neighbours_of(rows: Rows, queries: Ids, k: int) -> Ids:
    """The k nearest rows of each query but itself, (Q, k)."""
    found = nearest(rows[queries], [rows], (), k + 1, torch.device("cpu")).rows.numpy()
    others = found != queries[:, None]
    others[others.all(1), -1] = False  # of many that are equal, the query itself may not be among the first
    return found[others].reshape(len(queries), k)


def describe_questions(labelling: Labelling, answers: AnswerFile) -> list[str]:
    """What is asked, and how much the answers will tell."""
    questions, (model, other) = labelling.questions, labelling.models
    lines = [printable_line(note) for note in labelling.notes]
    if not len(questions.couples):
        return [
            *lines,
            f"{model} and {other} find the same {questions.k} nearest of each of "
            f"{pluralize(questions.queries, 'image')}: there is nothing to ask",
        ]
    known = len(labelling.same(answers))
    width = questions.expected_half_width(len(labelling.pairs))
    before = f", {known:,} of which are answered" if known else ""
    return [
        *lines,
        f"{percent(questions.differing)} % of the {questions.k} nearest of {pluralize(questions.queries, 'image')} "
        f"differ between {model} and {other}",
        f"{pluralize(len(labelling.pairs), 'question')}{before}; the interval of the difference will be about "
        f"+/- {percent(width)} points",
    ]


def describe_result(labelling: Labelling, answers: AnswerFile) -> str:
    """The table, and the verdict in the last line."""
    found, questions, (model, other) = labelling.result(answers), labelling.questions, labelling.models
    if not len(questions.couples):
        return f"{model} - {other}: 0.0 points, as they find the same"
    if found is None:
        return f"no answers about {model} and {other} yet"
    k, shown = questions.k, found.difference
    table = [("model", f"precision at {k}", "95% interval", "difference", "95% interval", "answers")]
    count = f"{found.answers:,}"
    table.append((other, *_shown(found.other), "", "", count))
    table.append((model, *_shown(found.model), *_shown(shown, signed=True), count))
    needed = ", ".join(f"{100 * gap:.0f}: {answers_for(questions, found, gap):,}" for gap in _DIFFERENCES)
    lines = [
        *align(table),
        f"answers: {found.answers:,} of {len(labelling.pairs):,}, {found.unsure:,} unsure (each counts as half)",
        f"of {questions.queries:,} queries {percent(questions.differing)} % of the neighbours differ; right are "
        f"{percent(found.only_model)} % of those that only {model} finds, {percent(found.only_other)} % of those that "
        f"only {other} finds",
        f"answers that would show a difference of so many points: {needed}",
        f"{model} - {other}: {_signed(shown.value)} points, 95% interval {_signed(shown.low)} to "
        f"{_signed(shown.high)}: {_OUTCOMES[found.outcome].format(model=model)}",
    ]
    return "\n".join(map(printable_line, lines))


def _shown(figure: Figure | None, *, signed: bool = False) -> tuple[str, str]:
    if figure is None:
        return "", ""
    show = _signed if signed else percent
    return show(figure.value), f"{show(figure.low)} to {show(figure.high)}"


def _signed(fraction: float) -> str:
    return f"{100 * fraction:+.1f}"


def as_json(labelling: Labelling, answers: AnswerFile) -> Mapping[str, Any]:
    """All figures, as fractions; `result` is null without answers, and where the models find the same."""
    found, questions = labelling.result(answers), labelling.questions
    return {
        "models": {"model": labelling.models[0], "other": labelling.models[1]},
        "k": questions.k,
        "queries": questions.queries,
        "differing": questions.differing,
        "questions": len(labelling.pairs),
        "result": None if found is None else {**asdict(found), "outcome": found.outcome},
    }
