"""The server: where it listens and by which names, connections without requests, and the page in a real browser."""

from __future__ import annotations

import http.client
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from grappa_dist.serving import server
from grappa_dist.serving.server import config_of, hosts_of, take_port, url_of
from tests.chromium import Tab, browsing
from tests.retrieval.photos import model_in, write_photos
from tests.serving.process import PATIENCE_S, Serving, serving
from tests.test_docs import DOCS
from tests.test_docs_commands import run_by

if TYPE_CHECKING:
    from playwright.sync_api import Page

SCROLLS = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
DROP = """async ([url, name]) => {
  const blob = await (await fetch(url)).blob();
  const data = new DataTransfer();
  data.items.add(new File([blob], name, { type: "image/png" }));
  for (const kind of ["dragenter", "dragover", "drop"])
    document.body.dispatchEvent(new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
}"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """The command of docs/serve.md, at a port that is free."""
    folder = tmp_path_factory.mktemp("served")
    write_photos(folder / "photos")
    model_in(folder / "runs" / "mine")
    ((words,),) = run_by("test_the_page_of_the_docs_command_answers_its_python")
    with serving(folder, *words[1:], "--port", "0", "--max-upload-mib", "1") as started:
        yield started
        assert started.stop() == (0, "stopped\n")
        assert "Traceback" not in started.log.read_text()


def test_the_page_of_the_docs_command_answers_its_python(
    running: Serving, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(running.log.parent)
    shutil.copy("photos/cat/2.png", "query.jpg")
    (code,) = re.findall(r"^```python\n(.*?)^```", DOCS["docs/serve.md"], re.MULTILINE | re.DOTALL)
    assert "http://127.0.0.1:8000/" in code
    exec(code.replace("http://127.0.0.1:8000/", running.url), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("backbone [('cat/2.png', ")
    assert lines[1].startswith("neighbours [('cat/2.png', ")
    assert lines[2].startswith("['k=0', 'k=1'] [0.")


def until(page: Page, expression: str) -> None:
    """Waits until it is true; playwright's own wait is an eval, which the page's policy refuses."""
    end = time.monotonic() + PATIENCE_S
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        time.sleep(0.05)


def columns(tab: Tab) -> list[list[str]]:
    """The names of the hits in each column, once they are there."""
    tab.page.wait_for_selector("#columns section")
    sections = tab.page.query_selector_all("#columns section")
    return [[str(span.text_content()) for span in section.query_selector_all("li a span")] for section in sections]


def test_a_file_that_is_chosen_has_both_columns_bars_and_links(running: Serving) -> None:
    photos = running.log.parent / "photos"
    with browsing(1280, 900) as tab:
        tab.page.goto(running.url)
        until(tab.page, "document.querySelector('#about').textContent !== ''")
        assert tab.page.text_content("#about") == "12 images under backbone, 12 images under neighbours"
        tab.page.set_input_files("#file", str(photos / "cat" / "2.png"))
        found = columns(tab)
        assert [(names[0], len(names)) for names in found] == [("cat/2.png", 10)] * 2
        left, right = (box.bounding_box() for box in tab.page.query_selector_all("#columns section"))
        assert left is not None
        assert right is not None
        assert left["x"] + left["width"] <= right["x"]
        assert left["y"] == right["y"]
        widths = tab.page.eval_on_selector_all("#bars i", "bars => bars.map(bar => bar.getBoundingClientRect().width)")
        texts = tab.page.eval_on_selector_all("#bars dd", "cells => cells.map(cell => cell.textContent)")
        shares = [float(text.split()[0]) for text in texts if text]
        assert len(widths) == len(shares) == 2
        assert sum(shares) == pytest.approx(100, abs=0.2)
        assert widths[0] / sum(widths) == pytest.approx(shares[0] / 100, abs=0.01)
        tab.page.click("summary")
        assert len(tab.page.query_selector_all("#layers tbody tr")) == 2
        until(tab.page, "[...document.querySelectorAll('#columns img')].some(i => i.naturalWidth > 0)")
        with tab.page.context.expect_page() as opened:
            tab.page.click("#columns section:last-child li:first-child a")
        until(opened.value, "document.images[0]?.naturalWidth === 36")  # the tab is there before its document
        assert opened.value.evaluate("document.contentType") == "image/png"
        tab.page.select_option("#hits", "5")
        until(tab.page, "document.querySelectorAll('#columns li').length === 10")
        tab.page.click("#columns section:first-child li:nth-child(2) button")
        until(tab.page, f"document.querySelector('#query').alt === {('The query: ' + found[0][1])!r}")
        assert tab.errors == []


def test_an_image_that_is_dropped_is_searched_in_the_dark_on_a_phone(running: Serving) -> None:
    with browsing(390, 844, "dark") as tab:
        tab.page.goto(running.url)
        row = tab.page.evaluate("document.querySelector('#columns section')")
        assert row is None
        tab.page.evaluate(DROP, ["images/0/0", "<b>anemone</b>.png"])
        found = columns(tab)
        assert [names[0] for names in found] == ["anemone/0.png"] * 2
        assert {name for names in found for name in names} <= {name.replace("\n", "\\n") for name in all_names(running)}
        assert str(tab.page.text_content("#status")).startswith("<b>anemone</b>.png, 36 × 40 pixels")
        assert tab.page.evaluate(SCROLLS) is False
        assert tab.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(14, 19, 25)"
        tab.page.click("summary")
        assert tab.page.evaluate(SCROLLS) is False
        assert tab.errors == []


def all_names(running: Serving) -> list[str]:
    photos = running.log.parent / "photos"
    return [str(path.relative_to(photos)) for path in photos.rglob("*.png")]


def test_what_is_refused_is_said_on_the_page_and_the_keyboard_reaches_everything(running: Serving) -> None:
    with browsing() as tab:
        tab.page.goto(running.url)
        tab.page.keyboard.press("Tab")
        assert tab.page.evaluate("document.activeElement.id") == "file"
        tab.page.set_input_files("#file", {"name": "a.svg", "mimeType": "image/svg+xml", "buffer": b"<svg/>"})
        tab.page.wait_for_selector("#status.error")
        assert str(tab.page.text_content("#status")).startswith("a.svg: the image cannot be read: no JPEG")
        large = {"name": "large.png", "mimeType": "image/png", "buffer": bytes(2**20 + 1)}
        tab.page.set_input_files("#file", large)
        assert tab.page.text_content("#status") == "large.png: the image has more than 1 MiB"
        assert [error for error in tab.errors if "415" not in error] == []  # which the browser notes itself


@pytest.mark.long
def test_a_second_start_embeds_nothing_and_ctrl_c_stops_it(running: Serving) -> None:
    words = ("serve", "--model", "runs/mine", "--images", "photos", "--keep", "embeddings/served", "--port", "0")
    with serving(running.log.parent, *words) as second:
        assert second.url != running.url
        assert second.stop(signal.SIGINT) == (0, "stopped\n")
        log = second.log.read_text()
    assert log.count("12 of 12 images were embedded before") == 2


def test_broken_requests_leave_the_server_answering(running: Serving) -> None:
    host, port = urlsplit(running.url).hostname, urlsplit(running.url).port
    for words in (
        b"\x16\x03\x01\x02\x00\x01\x00",  # TLS
        b"GET /images/0/../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no host
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + bytes(70_000) + b"\r\n\r\n",
        b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nhalf",  # and it hangs up
        b"POST /search HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    ):
        with socket.create_connection((host, port), timeout=60) as connection:
            connection.sendall(words)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(2**16)
            assert b" 200 " not in answer.split(b"\r\n")[0]
            assert b"root:" not in answer
    connection = http.client.HTTPConnection(str(host), port, timeout=60)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200


@pytest.mark.parametrize(
    "words", [b"", b"GET / HTTP/1.1\r\nHost: loc", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET"]
)
def test_a_connection_without_a_whole_request_is_closed(words: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    async def health(request: Request) -> Response:
        return Response("ok")

    monkeypatch.setattr(server, "HEAD_S", 0.2)
    running = uvicorn.Server(config_of(Starlette(routes=[Route("/health", health)])))
    with take_port("127.0.0.1", 0, public=False) as bound:
        bound.listen()
        thread = threading.Thread(target=running.run, args=([bound],))
        thread.start()
        try:
            with socket.create_connection(bound.getsockname(), timeout=PATIENCE_S) as connection:
                connection.sendall(words)
                received = b""
                while part := connection.recv(2**16):
                    received += part
            assert received.endswith(b"ok" if words.startswith(b"GET /health") else b"")
        finally:
            running.should_exit = True
            thread.join()


def test_a_port_that_is_in_use_is_one_line(running: Serving) -> None:
    port = int(urlsplit(running.url).port or 0)
    with pytest.raises(ValueError, match=rf"^--port {port}: cannot listen on 127\.0\.0\.1 \(Address already in use\)"):
        take_port("127.0.0.1", port, public=False)


@pytest.mark.parametrize(
    ("host", "url"), [("127.0.0.1", "http://127.0.0.1:"), ("localhost", "http://"), ("::1", "http://[::1]:")]
)
def test_the_loopback_needs_no_leave(host: str, url: str) -> None:
    if host == "::1" and not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    with take_port(host, 0, public=False) as bound:
        assert url_of(bound).startswith(url)
        assert not url_of(bound).endswith(":0/")


def test_addresses_that_other_machines_reach_need_leave() -> None:
    with pytest.raises(ValueError, match=r"^--host 0\.0\.0\.0: other machines could see the images, .*--public"):
        take_port("0.0.0.0", 0, public=False)
    with take_port("0.0.0.0", 0, public=True) as bound:
        assert url_of(bound).startswith("http://127.0.0.1:")
    with pytest.raises(ValueError, match=r"^--host no\.such\.host\.invalid: no address of this machine"):
        take_port("no.such.host.invalid", 0, public=True)
    with pytest.raises(ValueError, match=r"^--port 0: cannot listen on 192\.0\.2\.1"):
        take_port("192.0.2.1", 0, public=True)


def test_requests_may_name_the_loopback_the_host_and_what_is_allowed() -> None:
    assert hosts_of("127.0.0.1", ())[:3] == ("localhost", "127.0.0.1", "[::1]")
    assert {"[fd00::1]", socket.gethostname(), "photos.example"} <= set(hosts_of("fd00::1", ("photos.example",)))
