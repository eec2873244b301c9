"""The last lines of a terminal, which are replaced while a run goes on: a bar for each job, by rich."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TextIO

from rich.console import Console as Terminal
from rich.console import ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from grappa_dist.output import printable_line, without_secrets
from grappa_dist.progress import Status, describe

NARROW = 70  # columns below which there is no place for a bar
MOST_JOBS = 12  # on a terminal at once
_BAR_COLUMNS = 24


class Bars:
    """The last lines of a terminal, which are replaced: a bar for each job, and what `footer` says below them."""

    def __init__(self, stream: TextIO, footer: Callable[[], str] = lambda: "") -> None:
        self._jobs: Mapping[str, Status] = {}
        self._footer = footer
        self._terminal = Terminal(file=stream, force_terminal=True, highlight=False, markup=False, emoji=False)
        self._live: Live | None = None

    def log(self, line: str) -> None:
        """Prints a line above the bars; it has no control characters."""
        self._terminal.print(Text(line), soft_wrap=True)

    def show(self, jobs: Mapping[str, Status]) -> None:
        """Shows these jobs in place of the ones before."""
        self._jobs = dict(jobs)
        if self._live is None:
            of_terminal = sys.stdout is not None and sys.stdout.isatty()
            self._live = Live(
                self,
                console=self._terminal,
                transient=True,
                refresh_per_second=2,
                vertical_overflow="crop",
                redirect_stdout=of_terminal,  # else what goes to a file would go to the terminal
            )
            self._live.start()
        self._live.refresh()

    def close(self) -> None:
        """Removes the bars."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __rich_console__(self, console: Terminal, options: ConsoleOptions) -> RenderResult:
        shown = list(self._jobs.items())[:MOST_JOBS]
        wide = options.max_width >= NARROW
        yield _table(shown) if wide else Text("\n").join(_lines(shown))
        if len(self._jobs) > len(shown):
            yield _text(f"and {len(self._jobs) - len(shown)} more")
        if footer := self._footer():
            yield _text(footer)


def _table(jobs: Sequence[tuple[str, Status]]) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True, overflow="crop", max_width=32)
    table.add_column(width=_BAR_COLUMNS)
    table.add_column(no_wrap=True, overflow="crop")
    for name, status in jobs:
        total = status.get("of")
        bar = ProgressBar(total=total, completed=status["done"], width=_BAR_COLUMNS) if total else Text("")
        table.add_row(_text(name), bar, _text(describe(status)))
    return table


def _lines(jobs: Sequence[tuple[str, Status]]) -> Iterator[Text]:
    for name, status in jobs:
        yield _text(f"{name}: {describe(status)}")


def _text(text: str) -> Text:
    """One line as it is, without control characters and secrets."""
    return Text(printable_line(without_secrets(text)), no_wrap=True, overflow="crop")
