"""The file of answers: a kill, and lines that are none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from grappa_dist.retrieval.answer_file import open_answers


def test_a_kill_between_answers_loses_none_of_those_before(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    script = (
        "import os, sys; from pathlib import Path; from grappa_dist.retrieval.answer_file import open_answers\n"
        "with open_answers(Path(sys.argv[1])) as answers:\n"
        "    for number in range(5): answers.add(['name', 'name'], [str(number), 'x'], 'same')\n"
        "    os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode == -9
    with open_answers(path) as answers:
        answers.add(["name", "name"], ["5", "x"], "different")
        assert answers.found == {
            frozenset((str(number), "x")): "same" if number < 5 else "different" for number in range(6)
        }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("same", "not JSON"),
        (
            '{"xxh3": ["a", "b"], "answer": "yes"}',
            '"yes"}: expected {"images": [NAME, NAME], "xxh3": [SUM',
        ),
        ('{"images": ["a", "b"], "answer": "same"}', "expected"),
        ('{"xxh3": ["a"], "answer": "same"}', "expected"),
        ('["a", "b", "same"]', "expected"),
    ],
)
def test_a_line_that_is_no_answer_is_named_and_the_file_stays(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(f'{{"xxh3": ["a", "b"], "answer": "same"}}\n{line}\n')
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"answers\.jsonl, line 2: ") as error, open_answers(path):
        pass
    assert message in str(error.value)
    assert path.read_bytes() == before
