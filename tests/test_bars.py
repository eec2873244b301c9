from __future__ import annotations

import io
import re

import pytest

from grappa_dist.bars import MOST_JOBS, Bars
from grappa_dist.console import Console
from grappa_dist.output import is_live


class Screen(io.TextIOWrapper):
    """A terminal of some encoding."""

    def __init__(self, encoding: str = "utf-8") -> None:
        self.bytes = io.BytesIO()
        super().__init__(self.bytes, encoding, errors="backslashreplace", write_through=True)

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """What was ever shown, without what controls the terminal."""
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.bytes.getvalue().decode(self.encoding))
        return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


JOBS = {
    f"k={k}": {"done": 25, "of": 90, "loss": 0.931, "images_per_s": 211.0, "left_s": 9.6}
    for k in range(4, 6 + MOST_JOBS)
}


@pytest.mark.parametrize("columns", [40, 120])
def test_bars_fit_the_terminal_and_go_when_the_stage_ends(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    screen = Screen()
    bars = Bars(screen, lambda: "adapt 4.0s, about 10s left; run about 3m20s left")
    bars.show(JOBS)
    bars.log("[  0:32] adapt: k=9 is trained")
    bars.close()
    lines = screen.lines()
    assert max(map(len, lines)) <= columns
    assert any("k=4" in line and "25/90 loss 0.931 211 img/s" in line for line in lines)
    assert any("━" in line for line in lines) == (columns == 120)
    assert "and 2 more" in lines
    assert lines[-1] == "[  0:32] adapt: k=9 is trained" or lines.count("[  0:32] adapt: k=9 is trained") == 1
    assert any(line.startswith("adapt 4.0s, about 10s left") for line in lines)
    assert screen.bytes.getvalue().endswith(b"\x1b[2K")  # the bars are gone


def test_bars_are_ascii_where_the_terminal_has_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    screen = Screen("ascii")
    bars = Bars(screen)
    bars.show({"k=4": {"done": 1, "of": 2}})
    bars.close()
    assert "\\u" not in "".join(screen.lines())
    assert any("--" in line for line in screen.lines())


def test_names_neither_style_the_terminal_nor_control_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    console = Console()
    with console.stage("embed", "[red]a[/red] :smile: \x1b]0;title\x07"):
        console.jobs({"\x1b[2Jevil [bold]": {"phase": "x\x9b31m\ny", "done": 1, "of": 2}})
    console.close()
    written = screen.bytes.getvalue()
    assert b"\x1b]0;" not in written
    assert b"\x1b[2J" not in written
    assert "\x9b".encode() not in written
    assert not re.search(rb"\x1b\[[0-9;]*3[0-7]m", written)  # no colour
    assert any("[red]a[/red] :smile: \\x1b]0;title\\x07" in line for line in screen.lines())
    assert any("\\x1b[2Jevil [bold]" in line for line in screen.lines())


@pytest.mark.parametrize(("name", "live"), [("xterm", True), ("dumb", False), ("", False)])
def test_a_dumb_terminal_gets_plain_lines(name: str, live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", name)
    screen = Screen()
    assert is_live(screen) == live
    assert not is_live(io.StringIO())
    monkeypatch.setattr("sys.stderr", screen)
    console = Console()
    with console.stage("embed", "3 images"):
        console.jobs({"embed": {"done": 1, "of": 3}})
    console.close()
    assert ("embed: 1/3" in " ".join(screen.lines())) == (not live)
    assert (b"\x1b" in screen.bytes.getvalue()) == live
