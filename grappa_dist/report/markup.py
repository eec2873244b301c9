"""Text on its way into HTML. Labels, keys and task names come from the data and are never trusted."""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Iterable

MISSING = "–"


def text(value: object, most: int = 300) -> str:
    """`value` escaped for element text and quoted attributes, cut to `most` characters."""
    plain = str(value)
    plain = plain if len(plain) <= most else plain[: most - 1] + "…"
    return html.escape("".join("\N{REPLACEMENT CHARACTER}" if _harmful(c) else c for c in plain), quote=True)


def _harmful(c: str) -> bool:
    """Control characters, lone surrogates, and marks that turn the direction of the text around them."""
    return (
        (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t")
        or "\u202a" <= c <= "\u202e"
        or "\u2066" <= c <= "\u2069"
    )


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction as percent without the sign, or a dash where there is none."""
    return decimal(100 * fraction, digits)


def points(difference: float) -> str:
    """A signed difference of fractions in percentage points, with a typographic minus."""
    if not math.isfinite(difference):
        return MISSING
    rounded = round(100 * difference, 1)
    return f"{'+' if rounded > 0 else '−' if rounded < 0 else '±'}{abs(rounded):.1f}"


def number(value: float) -> str:
    """A number for a reader: thousands apart, four significant digits below that."""
    if not math.isfinite(value):
        return MISSING
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def decimal(value: float, digits: int) -> str:
    """A number with a fixed count of decimals, or a dash where there is none."""
    return f"{value:.{digits}f}" if math.isfinite(value) else MISSING


def table(head: Iterable[str], body: Iterable[Iterable[str]], *, numeric: bool = True) -> str:
    """An HTML table of ready markup: the first column names the row, the others hold numbers unless told."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    rows = []
    for cells in body:
        first, *rest = cells
        rows.append(f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>")
    kind = "plain numeric" if numeric else "plain"
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def sentences(said: Iterable[tuple[str, str]]) -> str:
    """A list of pairs of what a sentence is about and the sentence, neither of them trusted."""
    items = "".join(f"<li><b>{text(about, 60)}</b> {text(what, 1500)}</li>" for about, what in said)
    return f'<ul class="reading">{items}</ul>' if items else ""


def absent(why: str) -> str:
    """Says why there is nothing to show."""
    return f'<p class="absent">{text(why)}</p>'
