"""The progress line: how far, how fast, how long still; not too often, and renewed on a terminal only."""

from __future__ import annotations

import io

from grappa_dist.make_shards.progress import Progress, Terminal, progress_line


def test_the_line_says_how_far_how_fast_and_how_long_still() -> None:
    line = progress_line((1500, 9500), (1, 9), 10.0, 1000)  # 500 were there before
    assert line == "1,500 of 9,500 images, 1 of 9 shards, 100 images/s, about 1m20s left"
    assert progress_line((0, 10), (0, 1), 0.0, 0).endswith("0 images/s")


def test_a_line_is_logged_once_per_interval() -> None:
    now, logged = [0.0], list[str]()
    progress = Progress(100, 4, logged.append, interval_s=30, clock=lambda: now[0])
    for second in range(1, 100):
        now[0] = second
        progress.add_images(1)
    assert [line.partition(" of")[0] for line in logged] == ["30", "60", "90"]


def test_only_a_terminal_gets_a_line_that_renews_itself() -> None:
    class Interactive(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Interactive()
    terminal = Terminal(stream)
    assert terminal.is_interactive
    assert not Terminal(io.StringIO()).is_interactive
    terminal.renew("10")
    terminal.renew("20")
    terminal.log("done")
    terminal.log("more")
    assert stream.getvalue() == "10\r\x1b[K20\r\x1b[Kdone\nmore\n"


def test_control_characters_in_a_name_are_shown_and_not_obeyed() -> None:
    stream = io.StringIO()
    Terminal(stream).log("a\x1b[31m.txt\tleft\x9bout\nnext")
    assert stream.getvalue() == "a\\x1b[31m.txt\tleft\\x9bout\\nnext\n"
