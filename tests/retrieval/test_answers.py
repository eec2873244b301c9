"""Precision at k of two models from answers about pairs of images, against all labels and against simulation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from grappa_dist.retrieval.answers import (
    Comparison,
    Ids,
    Pair,
    Questions,
    answers_for,
    compare,
    pair_of,
    questions_of,
    some_queries,
)

K = 4


def names_of(count: int) -> list[str]:
    return [f"class {row % 7}/{row}.png" for row in range(count)]


def drawn_neighbours(seed: int, count: int, k: int = K) -> Ids:
    """k different others of each of `count` rows, (count, k)."""
    rng = np.random.default_rng(seed)
    return np.array([rng.permutation(np.delete(np.arange(count), row))[:k] for row in range(count)])


def drawn(count: int, k: int = K) -> tuple[Ids, Ids, NDArray[np.int64]]:
    """Neighbours by two models, of which the first finds more of a query's class, and the class of each row."""
    labels = np.random.default_rng(2).integers(3, size=count)
    mine, theirs = drawn_neighbours(0, count, k + 3), drawn_neighbours(1, count, k)
    is_other = labels[mine] != labels[:, None]
    return np.take_along_axis(mine, is_other.argsort(1, kind="stable"), 1)[:, :k], theirs, labels


def answers_by(labels: NDArray[np.int64], questions: Questions) -> dict[Pair, float]:
    """The answers to all that may be asked."""
    units = [row for ids in (questions.couples, questions.agreed) for row in ids.tolist()]
    return {pair_of(q, row): float(labels[q] == labels[row]) for q, *rows in units for row in rows}


def known(found: Comparison | None) -> Comparison:
    assert found is not None
    return found


def test_all_answers_give_the_precision_of_all_labels_and_no_doubt() -> None:
    mine, theirs, labels = drawn(30)
    questions = questions_of(np.arange(30), mine, theirs, names_of(30))
    found = known(compare(questions, answers_by(labels, questions)))
    true = [float((labels[rows] == labels[:, None]).mean()) for rows in (mine, theirs)]
    assert found.model is not None
    assert found.other is not None
    for figure, value in zip((found.model, found.other, found.difference), (*true, true[0] - true[1]), strict=True):
        assert [figure.value, figure.low, figure.high] == pytest.approx([value] * 3, abs=1e-12)
    assert found.outcome == "better"
    assert len(questions.couples) + len(questions.agreed) == 30 * K


def test_the_first_answers_are_right_in_the_mean_and_their_intervals_hold_the_figures_of_all_labels() -> None:
    mine, theirs, labels = drawn(60)
    questions = questions_of(np.arange(60), mine, theirs, names_of(60))
    same = answers_by(labels, questions)
    all_of_them, rng = known(compare(questions, same)), np.random.default_rng(3)
    found = []
    for _ in range(300):
        shuffled = replace(
            questions, couples=rng.permutation(questions.couples), agreed=rng.permutation(questions.agreed)
        )
        asked = shuffled.first(60)
        assert len(asked) <= 60
        found.append(known(compare(shuffled, {pair: same[pair] for pair in asked})))
    differences = np.array([one.difference.value for one in found])
    true = all_of_them.difference.value
    assert abs(differences.mean() - true) < 4 * differences.std() / math.sqrt(len(found))
    assert np.mean([one.difference.low <= true <= one.difference.high for one in found]) > 0.91
    assert np.mean([one.difference.high - one.difference.low for one in found]) < 6 * differences.std()
    assert all_of_them.other is not None
    level = all_of_them.other.value
    assert np.mean([one.other is not None and one.other.low <= level <= one.other.high for one in found]) > 0.91


def test_the_interval_of_few_of_many_couples_is_that_of_agresti_and_min() -> None:
    count, asked, better, worse = 5_000, 60, 14, 5
    rows = 1 + np.arange(2 * count).reshape(count, 2)
    questions = Questions(1, count, np.column_stack([np.zeros(count, np.int64), rows]), np.empty((0, 2), np.int64))
    same: dict[Pair, float] = {}
    for number, (mine, theirs) in enumerate(rows[:asked].tolist()):
        same |= {(0, mine): float(number < better), (0, theirs): float(better <= number < better + worse)}
    found = known(compare(questions, same))
    centre = (better - worse) / (asked + 2)
    error = 1.96 * math.sqrt(better + worse + 1 - (better - worse) ** 2 / (asked + 2)) / (asked + 2)
    assert found.difference.value == pytest.approx((better - worse) / asked)
    assert (found.difference.low, found.difference.high) == pytest.approx((centre - error, centre + error), abs=2e-3)
    assert (found.couples, found.answers, found.model is None) == (asked, 2 * asked, False)


def test_models_that_find_the_same_leave_nothing_to_ask() -> None:
    mine = drawn_neighbours(0, 9)
    questions = questions_of(np.arange(9), mine, mine[:, ::-1], names_of(9))  # in another order, which no k sees
    assert (questions.differing, questions.first(100), compare(questions, {})) == (0, [], None)


def test_one_query_and_one_neighbour_are_enough() -> None:
    questions = questions_of(np.array([2]), np.array([[0]]), np.array([[1]]), names_of(3))
    assert questions.first(1) == []  # half a couple says nothing
    assert questions.first(9) == [(0, 2), (1, 2)]
    found = known(compare(questions, {(0, 2): 0.0, (1, 2): 1.0}))
    assert (found.difference.low, found.difference.high, found.outcome) == (-1, -1, "worse")


def test_a_pair_that_two_queries_share_is_asked_once() -> None:
    mine, theirs = np.array([[1], [0], [0], [0]]), np.array([[2], [3], [1], [1]])
    questions = questions_of(np.arange(4), mine, theirs, names_of(4))
    asked = questions.first(100)
    assert len(asked) == len(set(asked)) == 5  # of 4 couples: 0-1 is that of two, 0-2 and 1-3 of two more
    found = known(compare(questions, dict.fromkeys(asked, 1.0)))
    assert (found.couples, found.answers, found.outcome) == (4, 5, "equal")


def test_answers_beyond_the_first_that_is_missing_are_not_used() -> None:
    mine, theirs, labels = drawn(30)
    questions = questions_of(np.arange(30), mine, theirs, names_of(30))
    same = answers_by(labels, questions)
    query, row, _ = questions.couples[7].tolist()
    del same[pair_of(query, row)]
    assert known(compare(questions, same)).couples <= 7
    query, row, _ = questions.couples[0].tolist()
    same.pop(pair_of(query, row), None)
    assert compare(questions, same) is None


def test_an_unsure_answer_counts_half_and_is_counted() -> None:
    questions = questions_of(np.array([2]), np.array([[0]]), np.array([[1]]), names_of(3))
    found = known(compare(questions, {(0, 2): 0.5, (1, 2): 0.0}))
    assert (found.difference.value, found.unsure, found.only_model) == (0.5, 1, 0.5)


def test_a_fifth_of_the_questions_is_about_what_both_find() -> None:
    mine, theirs, _ = drawn(60, k=30)
    questions = questions_of(np.arange(60), mine, theirs, names_of(60))
    agreed = {pair_of(*pair) for pair in questions.agreed.tolist()}
    couples = {pair_of(query, row) for query, *rows in questions.couples.tolist() for row in rows}
    only_agreed = [pair for pair in questions.first(100) if pair in agreed - couples]
    assert 10 <= len(only_agreed) <= 20


def test_more_images_leave_the_order_of_the_others_as_it_is() -> None:
    mine, theirs, _ = drawn(40)
    names = names_of(40)
    some = questions_of(np.arange(20), mine[:20], theirs[:20], names).couples.tolist()
    among_all = questions_of(np.arange(40), mine, theirs, names).couples.tolist()
    assert [couple for couple in among_all if couple in some] == some
    assert some != sorted(some)
    drawn_of_all = some_queries(names, 10)
    assert drawn_of_all.tolist() == sorted(set(drawn_of_all.tolist()))
    assert set(some_queries(names[:30], 10).tolist()) >= {row for row in drawn_of_all.tolist() if row < 30}


def test_half_the_gap_takes_four_times_as_many_answers_until_all_are_asked() -> None:
    mine, theirs, labels = drawn(60)
    questions = questions_of(np.arange(60), mine, theirs, names_of(60))
    found = known(compare(questions, answers_by(labels, questions)))
    many = replace(questions, couples=np.tile(questions.couples, (1000, 1)), queries=60_000)
    assert answers_for(many, found, 0.01) / answers_for(many, found, 0.02) == pytest.approx(4, rel=0.1)
    assert answers_for(questions, found, 1e-9) <= len(questions.couples) * 2.5 + 1
    assert many.expected_half_width(800) == pytest.approx(many.expected_half_width(200) / 2, rel=0.02)
    assert questions.expected_half_width(10**6) == 0
