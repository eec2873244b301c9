"""The page that asks about pairs: what it gives away, what it keeps, and the command in a real browser."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.testclient import TestClient

from grappa_dist.data.decoding import BadImage
from grappa_dist.retrieval.answer_file import AnswerFile, open_answers
from grappa_dist.retrieval.answers import questions_of
from grappa_dist.retrieval.labelling import Labelling
from grappa_dist.serving.questions import create_app
from grappa_dist.serving.server import config_of, take_port, url_of
from tests.chromium import Tab, browsing
from tests.retrieval.test_map_images import finished_run
from tests.serving.process import PATIENCE_S, serving
from tests.serving.test_server import SCROLLS, until
from tests.stages import tiny

NAMES = [f"secret {row}.png" for row in range(7)]


@dataclass(frozen=True)
class Asked:
    client: TestClient
    labelling: Labelling
    answers: AnswerFile
    finished: list[bool]
    gone: set[int]  # rows whose files are no longer there


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[Asked]:
    def read(row: int) -> bytes | BadImage:
        return BadImage("gone") if row in gone else tiny.picture(row)

    mine, theirs = np.array([[1], [2], [3]]), np.array([[4], [5], [6]])
    questions = questions_of(np.arange(3), mine, theirs, NAMES)
    labelling = Labelling(("average", "backbone"), NAMES, read, questions, questions.first(9))
    finished, gone = list[bool](), set[int]()
    with open_answers(tmp_path / "answers.jsonl") as answers:
        app = create_app(labelling, answers, finish=lambda: finished.append(True))
        with TestClient(app, base_url="http://127.0.0.1") as client:
            yield Asked(client, labelling, answers, finished, gone)


def test_neither_page_nor_questions_nor_images_name_an_image_or_a_model(asked: Asked) -> None:
    listed = asked.client.get("/questions")
    shown = [asked.client.get(path).text for path in ("/", "/questions.js", "/questions.css")] + [listed.text]
    for word in ("secret", "average", "backbone", "neighbour"):
        assert not any(word in text for text in shown)
    pairs = listed.json()["questions"]
    assert [pair["answer"] for pair in pairs] == [None] * len(asked.labelling.pairs)
    assert "script-src 'self'" in listed.headers["content-security-policy"]
    shown_word, gone_word = pairs[0]["images"]
    found = asked.client.get(f"/images/{shown_word}")
    assert found.content[:2] == b"\xff\xd8"  # pixels alone, as JPEG
    asked.gone.add(asked.labelling.pairs[0][1])
    found = asked.client.get(f"/images/{gone_word}")
    assert (found.status_code, found.json()) == (404, {"error": "the image cannot be read: gone"})
    assert asked.client.get("/images/0").status_code == 404


def test_an_answer_is_in_the_file_before_the_reply_and_may_be_changed(asked: Asked) -> None:
    for answer in ("different", "same"):
        assert asked.client.post("/questions/1", json={"answer": answer}).json() == {"answer": answer}
        last = json.loads(asked.answers.path.read_text().splitlines()[-1])
        assert (last["images"], last["answer"]) == ([NAMES[row] for row in asked.labelling.pairs[1]], answer)
    assert [pair["answer"] for pair in asked.client.get("/questions").json()["questions"]][:3] == [None, "same", None]


@pytest.mark.parametrize("body", [b"", b"same", b'{"answer": "yes"}', b'{"answer": "same"' + b" " * 200 + b"}", b"[]"])
def test_what_is_no_answer_is_refused_and_kept_nowhere(asked: Asked, body: bytes) -> None:
    found = asked.client.post("/questions/0", content=body)
    assert (found.status_code, '"same", "different", "unsure"' in found.json()["error"]) == (400, True)
    assert not asked.answers.path.exists()


def test_other_sites_and_numbers_of_no_question_are_refused(asked: Asked) -> None:
    given = {"answer": "same"}
    for headers in ({"origin": "http://elsewhere"}, {"sec-fetch-site": "cross-site"}):
        assert asked.client.post("/questions/0", json=given, headers=headers).status_code == 403
    assert asked.client.post("/questions/99", json=given).status_code == 404
    assert asked.client.get("/questions", headers={"host": "elsewhere"}).status_code == 400
    assert not asked.answers.path.exists()


def test_an_answer_that_cannot_be_kept_is_not_confirmed(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(asked.answers, "add", full)
    found = asked.client.post("/questions/0", json={"answer": "same"})
    assert (found.status_code, found.json()["error"]) == (500, "the answer is not kept: No space left on device")


def test_the_result_comes_on_request_and_finish_ends_the_command(asked: Asked) -> None:
    assert asked.client.get("/result").json() == {"text": "no answers about average and backbone yet"}
    for number in range(len(asked.labelling.pairs)):
        asked.client.post(f"/questions/{number}", json={"answer": "same"})
    assert asked.client.get("/result").json()["text"].endswith("they are equally good")
    assert asked.finished == []
    assert asked.client.post("/finish", json={}).json() == {"finished": True}
    assert asked.finished == [True]


def loaded(tab: Tab, line: str) -> None:
    until(tab.page, f"document.querySelector('#status').textContent === {line!r}")
    until(tab.page, "['left', 'right'].every(id => document.getElementById(id).naturalWidth > 0)")


@contextmanager
def at_a_port(app: Starlette) -> Iterator[str]:
    """The application at a free port, in a thread of this process; its address."""
    with take_port("127.0.0.1", 0, public=False) as bound:
        running = uvicorn.Server(config_of(app))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [bound]})
        bound.listen()
        thread.start()
        try:
            yield url_of(bound)
        finally:
            running.should_exit = True
            thread.join()


def test_keys_answer_in_the_browser_and_a_phone_goes_on_in_the_dark(asked: Asked) -> None:
    count = len(asked.labelling.pairs)
    with at_a_port(create_app(asked.labelling, asked.answers)) as url:
        with browsing() as tab:
            tab.page.goto(url)
            loaded(tab, f"Question 1 of {count}")
            assert tab.page.is_disabled("#back")
            for place, key in enumerate("sudb", 1):
                loaded(tab, f"Question {place} of {count}")
                tab.page.keyboard.press(key)
            loaded(tab, f"Question 3 of {count}")
            assert tab.page.get_attribute("[data-answer=different]", "class") == "chosen"
            assert tab.page.text_content("#result") == ""
            tab.page.click("#so-far")
            until(tab.page, "document.querySelector('#result').textContent.includes('95% interval')")
            assert tab.page.is_hidden("#again")
            assert tab.errors == []
        given = [json.loads(line)["answer"] for line in asked.answers.path.read_text().splitlines()]
        assert given == ["same", "unsure", "different"]
        with browsing(390, 844, "dark") as tab:
            tab.page.goto(url)
            for place in range(4, count + 1):
                loaded(tab, f"Question {place} of {count}")
                assert tab.page.evaluate(SCROLLS) is False
                tab.page.click("[data-answer=same]")
            until(tab.page, "document.querySelector('#result').textContent.includes('95% interval')")
            assert tab.page.evaluate(SCROLLS) is False
            tab.page.click("#finish")
            until(tab.page, "document.querySelector('#status').textContent.startsWith('Finished')")
            assert tab.errors == []
    assert len(asked.answers.path.read_text().splitlines()) == count


def sent(url: str, body: object | None = None) -> Any:
    """The JSON that answers a request, a POST where there is a body."""
    with urlopen(Request(url, None if body is None else json.dumps(body).encode()), timeout=PATIENCE_S) as reply:
        return json.load(reply)


@pytest.mark.slow
def test_a_killed_command_goes_on_and_finish_ends_it_with_the_result(tmp_path: Path) -> None:
    finished_run(tmp_path / "run")
    words = ("evaluate", "--model", "run", "--label", "10", "--port", "0", "--json", "found.json")
    with serving(tmp_path, *words) as first:
        assert sent(f"{first.url}questions/0", {"answer": "same"}) == {"answer": "same"}
        first.process.send_signal(signal.SIGKILL)
    with serving(tmp_path, *words) as second:
        listed = sent(f"{second.url}questions")["questions"]
        assert [one["answer"] for one in listed] == ["same"] + [None] * (len(listed) - 1)
        for number in range(1, len(listed)):
            sent(f"{second.url}questions/{number}", {"answer": "same"})
        shown = sent(f"{second.url}result")["text"]
        assert sent(f"{second.url}finish", {}) == {"finished": True}
        out, _ = second.process.communicate(timeout=PATIENCE_S)
        assert (second.process.returncode, out) == (0, shown + "\n")
    assert json.loads((tmp_path / "found.json").read_text())["result"]["answers"] == len(listed)
