"""What programs print and log: characters that do no harm, no secrets, and streams whose failure ends no run."""

from __future__ import annotations

import argparse
import difflib
import io
import os
import re
import select
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NoReturn, TextIO

Mode = Literal["auto", "quiet", "json"]
HIDDEN = "***"  # in place of a secret
_WAIT_S = 10.0  # for a reader that is slow, where the stream does not block
HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # controls, among them the start of a terminal's escape sequences; not tab, newline
    "\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # direction, invisible, line separators
    "\U000e0000-\U000e007f\ud800-\udfff]"  # tags; lone surrogates, as in file names that are not UTF-8
)
_PASSWORD = re.compile(r"(?<=://)[^\s/@'\"<>]*(?::[^\s@'\"<>]*)?@")  # in any text: rather too much than too little
_USER = re.compile(r"://[^\s/@'\"<>]*@|\b(s3|gs)://[^\s@'\"<>]*:[^\s@'\"<>]*@")  # in a URL that is to be used
_QUERY = re.compile(r"(\w://[^\s?'\"<>]*\?)[^\s'\"<>]+")
_SIGNED = re.compile(
    r"[?&](x-(amz|goog)-(signature|credential|security-token)|signature|sig|token|key|\w*key_?id)=", re.IGNORECASE
)
_SECRET_NAME = re.compile(
    r"(^|_)(pass|passwd|password|passphrase|secrets?|tokens?|api_?keys?|access_?keys?|private_?keys?|secret_?keys?|"
    r"credentials?|keys?)(_id)?$",
    re.IGNORECASE,
)
_SHORTEST = 8  # characters of a secret in the environment that is looked for in texts


_chosen: Mode = "auto"


def choose_mode(*, quiet: bool = False, json: bool = False) -> None:
    """Says what this process shows of a run, from now on: `quiet`, warnings, errors and the end alone; `json`, an
    object a line on standard output; else bars on a terminal, and lines elsewhere.

    Raises:
        ValueError: both are asked for.
    """
    global _chosen
    if quiet and json:
        raise ValueError("--quiet and --json: expected one of them")
    _chosen = "quiet" if quiet else "json" if json else "auto"


@contextmanager
def quietly(quiet: bool) -> Iterator[None]:
    """While inside, as `choose_mode(quiet=quiet)` says; afterwards as before."""
    global _chosen
    before = _chosen
    choose_mode(quiet=quiet)
    try:
        yield
    finally:
        _chosen = before


def mode() -> Mode:
    return _chosen


def is_live(stream: TextIO | None) -> bool:
    """Whether lines of a stream can be replaced: a terminal that is not a dumb one."""
    terminal = os.environ.get("TERM", "").lower()
    return stream is not None and stream.isatty() and terminal not in ("", "dumb", "unknown")


def printable(text: str) -> str:
    """The text with control characters, marks of direction and lone surrogates as escapes; lines stay lines."""
    return HARMFUL.sub(lambda found: ascii(found[0])[1:-1], text)


def printable_line(text: str) -> str:
    """The same as one line: the name of a file cannot add lines to a log."""
    return printable(text).replace("\n", "\\n")


def suggestion(name: str, known: Iterable[str]) -> str:
    """For the end of a message about a misspelt name, e.g. "; did you mean 'fuse'?"; "" if no known one is like it."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


class Parser(argparse.ArgumentParser):
    """Adds a suggestion to the message about a misspelt option or choice."""

    def error(self, message: str) -> NoReturn:
        if unknown := re.match(r"unrecognized arguments: (-[^\s=]+)", message):
            message += suggestion(unknown[1], self._option_string_actions)
        elif wrong := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            message += suggestion(wrong[1], re.findall(r"[^\s,]+", wrong[2].replace(chr(39), "")))
        super().error(message)


def is_secret_name(name: str) -> bool:
    """Whether a variable or setting of that name usually holds a credential: AWS_SECRET_ACCESS_KEY, api_token, ..."""
    return bool(_SECRET_NAME.search(name))


def has_secret(text: str) -> bool:
    """Whether a URL in the text has a user, a password or a query that signs it, or the value of a secret variable."""
    return bool(_USER.search(text) or ("://" in text and _SIGNED.search(text)) or any(_values_in(text)))


def _values_in(text: str) -> Iterator[str]:
    """The values of secret variables that are in the text; those that are paths are none."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and is_secret_name(name) and not os.path.exists(value):
            yield value


def without_secrets(text: str) -> str:
    """The text without users and passwords in URLs, without their queries, and without values of secret variables."""
    for value in _values_in(text):
        text = text.replace(value, HIDDEN)
    if "://" in text:
        text = _QUERY.sub(rf"\1{HIDDEN}", _PASSWORD.sub(f"{HIDDEN}@", text))
    return text


class _Tolerant(io.RawIOBase):
    """A file descriptor whose errors are swallowed: what cannot be written is dropped."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.error: OSError | None = None  # the first

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            return self._write(data)
        except OSError as error:
            self.error = self.error or error
            return len(data)

    def _write(self, data: Any) -> int:
        try:
            return os.write(self._number, data)
        except BlockingIOError:  # another program has set the terminal so
            select.select([], [self._number], [], _WAIT_S)
            return os.write(self._number, data)


def guard_output() -> None:
    """From now on printing raises nothing: a reader that is gone, a full disk and a closed stream lose text, not work.

    Characters that the encoding of the locale lacks are printed as escapes.
    """
    for number in (0, 1, 2):  # a closed one would be given to the next file, and be written to by libraries
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdout = _guarded(1, sys.stdout)
    sys.stderr = _guarded(2, sys.stderr)


def _guarded(number: int, stream: Any) -> io.TextIOWrapper:
    encoding = "utf-8" if stream is None else stream.encoding
    if stream is not None:
        stream.flush()
    raw = _Tolerant(number)
    buffered: Any = io.BufferedWriter(raw)
    at_once = number == 2 or raw.isatty() or (stream is not None and stream.write_through)  # PYTHONUNBUFFERED
    return io.TextIOWrapper(buffered, encoding, errors="backslashreplace", line_buffering=at_once)


def unprinted() -> str:
    """Why what was printed on standard output did not arrive, for a warning; "" if it did, or nobody reads it."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    error = raw.error if isinstance(raw, _Tolerant) else None
    return "" if error is None or isinstance(error, BrokenPipeError) else error.strerror or type(error).__name__
