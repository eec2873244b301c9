"""What is asked about two models, the file of answers, and the result as text and JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from grappa_dist.retrieval.answer_file import open_answers
from grappa_dist.retrieval.labelling import Labelling, as_json, describe_questions, describe_result, labelling_of
from grappa_dist.retrieval.map_images import MapImages
from grappa_dist.retrieval.nearest import Rows
from grappa_dist.stages.ground_truth import numbered_members

ODD = "\udcff.png"  # a name that is not UTF-8


def rows_of(seed: int, count: int = 30) -> Rows:
    rows = np.random.default_rng(seed).normal(size=(count, 6)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def images(**embeddings: Rows) -> MapImages:
    count = len(next(iter(embeddings.values())))
    names = [f"same {number % 9}.png" for number in range(count - 1)] + [ODD]
    known = numbered_members(({} for _ in names), count)[0]
    return MapImages(names, known, embeddings, lambda row: str(row).encode(), ["Not shown: 1 image."])


def labelling(most: int = 40) -> Labelling:
    return labelling_of(images(backbone=rows_of(0), average=rows_of(1)), most, 3)


def test_the_neighbours_are_those_of_all_cosines_without_the_image_itself_even_among_copies() -> None:
    first, second = rows_of(0), rows_of(1)
    first[3:9] = first[3]  # six that are equal, more than k: an image need not be among its own nearest
    found = labelling_of(images(backbone=first, average=second), 10**6, 3).questions
    wanted = set()
    for query in range(30):
        near = []
        for rows in (second, first):
            cosines = rows @ rows[query]
            cosines[query] = -2
            near.append(set(np.argsort(-cosines, kind="stable")[:3].tolist()))
        wanted |= {(query, row, side) for side in (0, 1) for row in near[side] - near[1 - side]}
    couples = found.couples.tolist()
    assert {(query, row, side) for query, *both in couples for side, row in enumerate(both)} == wanted
    assert (len(found.couples) * 2, found.queries) == (len(wanted), 30)


def test_answers_are_in_the_file_at_once_and_the_later_one_counts(tmp_path: Path) -> None:
    path, asked = tmp_path / "new" / "answers.jsonl", labelling()
    with open_answers(path) as answers:
        assert asked.result(answers) is None
        assert describe_result(asked, answers) == "no answers about average and backbone yet"
        for number, (one, other) in enumerate(asked.pairs):
            asked.add(answers, (other, one), "unsure" if number == 0 else "same")
            assert len(path.read_text().splitlines()) == number + 1
        asked.add(answers, asked.pairs[0], "different")
        with pytest.raises(ValueError, match=r"answers\.jsonl: another process writes answers there \(process \d+"):
            open_answers(path).__enter__()
    with open_answers(path) as again:
        assert asked.same(again) == {pair: float(number > 0) for number, pair in enumerate(asked.pairs)}
        assert len({asked.names[row] for row in range(30)}) == 30  # nine names are of several images each
        elsewhere = replace(images(backbone=rows_of(0), average=rows_of(1)), read=lambda row: b"other %d" % row)
        assert labelling_of(elsewhere, 40, 3).same(again) == {}  # the same names, but other images


def test_the_result_has_both_models_the_difference_and_the_answers_as_text_and_json(tmp_path: Path) -> None:
    asked = labelling()
    with open_answers(tmp_path / "answers.jsonl") as answers:
        before = describe_questions(asked, answers)
        assert before[0] == "Not shown: 1 image."
        assert before[1].endswith("% of the 3 nearest of 30 images differ between average and backbone")
        assert before[2].startswith(f"{len(asked.pairs)} questions; the interval of the difference will be about +/- ")
        for pair in asked.pairs[:20]:
            is_mine = any({q, mine} == set(pair) for q, mine, _ in asked.questions.couples.tolist())
            asked.add(answers, pair, "same" if is_mine else "different")
        assert "questions, 20 of which are answered" in describe_questions(asked, answers)[2]
        lines = describe_result(asked, answers).splitlines()
        written = json.loads(json.dumps(as_json(asked, answers)))
    assert lines[0].split() == [
        "model",
        "precision",
        "at",
        "3",
        "95%",
        "interval",
        "difference",
        "95%",
        "interval",
        "answers",
    ]
    assert (lines[1].split()[0], lines[2].split()[0]) == ("backbone", "average")
    assert lines[-1].startswith("average - backbone: +")
    assert lines[-1].endswith(": average is better")
    assert written["models"] == {"model": "average", "other": "backbone"}
    assert (written["result"]["outcome"], written["k"]) == ("better", 3)
    difference = written["result"]["difference"]
    assert f"{100 * difference['value']:+.1f} points" in lines[-1]
    assert 0 < difference["low"] < difference["value"] <= difference["high"]


def test_models_that_find_the_same_one_model_and_one_image_are_said(tmp_path: Path) -> None:
    equal = labelling_of(images(backbone=rows_of(0), average=rows_of(0)), 40, 3)
    with open_answers(tmp_path / "answers.jsonl") as answers:
        assert describe_questions(equal, answers)[-1] == (
            "average and backbone find the same 3 nearest of each of 30 images: there is nothing to ask"
        )
        assert describe_result(equal, answers) == "average - backbone: 0.0 points, as they find the same"
        assert (as_json(equal, answers)["result"], list(equal.pairs)) == (None, [])
    with pytest.raises(ValueError, match="--label compares two models, and backbone is the only one; name another"):
        labelling_of(images(backbone=rows_of(0)), 40, 3)
    with pytest.raises(ValueError, match="1 image to compare the models on; expected at least 2"):
        labelling_of(images(backbone=rows_of(0, 1), average=rows_of(1, 1)), 40, 3)
    assert labelling_of(images(backbone=rows_of(0, 2), average=rows_of(1, 2)), 40, 3).questions.k == 1
