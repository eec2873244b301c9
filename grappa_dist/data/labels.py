"""Which values of `label` and `task` are none, and which are the same: one rule for JSON members, CSVs and folders.

Programs write one class in several ways (a column of pandas with a gap makes 1 to 1.0; file systems compose letters
differently), and write "no label" in several ways. Read literally, images without a label would be a class, and one
class two: wrong scores that nothing shows. docs/own_images.md has the rule for users.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from typing import NamedTuple

from grappa_dist.console import pluralize

LONGEST = 1000  # characters of a name: a text, say, is no class
# As pandas, Python and JSON write a value that is missing; "NA" and "none" are names of countries and of classes
_MISSING = frozenset({"nan", "NaN", "NAN", "-nan", "-NaN", "<NA>", "None", "null", "NULL"})
_WHOLE = re.compile(r"(-?)(0|[1-9][0-9]*)(\.0*)?")
_EXACT = 2**53  # a float beyond it is no exact whole number
_AROUND = "\ufeff\u200b\u2060"  # invisible, and no blanks to Python


class Named(NamedTuple):
    """What a value names."""

    name: str | None  # equal for what is the same; None: nothing
    remark: str = ""  # where it names nothing but something is written: what that is


def named(value: object) -> Named:
    """The class or task that a value of JSON, or a text, names.

    Whole numbers are the same in all ways of writing (1, 1.0, "1", "1.0"); texts are the same but for blanks around
    them and for composed letters (NFC). A list of one value is that value.
    """
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None:
        return Named(None)
    if isinstance(value, bool):
        return Named("true" if value else "false")
    if isinstance(value, float):
        if not math.isfinite(value):
            return Named(None, "NaN" if math.isnan(value) else "infinite")
        return _of_text(str(int(value)) if value.is_integer() and abs(value) < _EXACT else repr(value))
    if isinstance(value, int | str):
        return _of_text(str(value))
    return Named(None, "an empty list" if value == [] else "a list" if isinstance(value, list) else "an object")


def _of_text(text: str) -> Named:
    if len(text) > LONGEST:
        return Named(None, f"more than {LONGEST} characters")
    text = unicodedata.normalize("NFC", text).strip().strip(_AROUND).strip()
    if not text:
        return Named(None, "blank")
    if text in _MISSING:
        return Named(None, repr(text))
    if whole := _WHOLE.fullmatch(text):
        text = whole[2] if whole[2] == "0" else whole[1] + whole[2]
    return Named(None, "-1") if text == "-1" else Named(text)


class Names:
    """Numbers of what values name, in the order in which they come; shown as the first of them is written.

    Attributes:
        shown: by number.
        remarks: how many values named nothing, by what was written.
        merged: numbers that are written in several ways.
    """

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.remarks = Counter[str]()
        self.merged: set[int] = set()
        self.example = ""  # of what is written in several ways
        self._numbers: dict[tuple[object, str], int] = {}
        self._written: list[object] = []

    def number(self, value: object, within: object = None) -> int:
        """The number of what a value names among those of `within`; -1 where it names nothing."""
        found = named(value)
        if found.name is None:
            self.remarks[found.remark] += bool(found.remark)
            return -1
        number = self._numbers.setdefault((within, found.name), len(self.shown))
        if number == len(self.shown):
            self.shown.append(str(value).strip() if isinstance(value, str | bool | int | float) else found.name)
            self._written.append(value)
        elif type(value) is not type(self._written[number]) or value != self._written[number]:
            self.example = self.example or f"{self._written[number]!r:.80} and {value!r:.80}"
            self.merged.add(number)
        return number

    def described(self, what: str) -> list[str]:
        """Lines about what names nothing, and about what is the same; none where values are plain.

        Args:
            what: the values are, such as "label".
        """
        lines = []
        if written := [f"{number} {remark}" for remark, number in self.remarks.most_common() if number]:
            more = f" and {len(written) - 5} other kinds" if len(written) > 5 else ""
            lines.append(
                f"{pluralize(self.remarks.total(), 'image has', 'images have')} a {what} that counts as none "
                f"({', '.join(written[:5])}{more}); "
                f"where it is a {what}, give it another name"
            )
        if self.merged:
            lines.append(
                f"{len(self.merged)} {what} names are written in several ways and count as one each, such as "
                f"{self.example}; where they differ, give them other names"
            )
        return lines
