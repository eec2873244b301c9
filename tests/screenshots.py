"""Draws the picture of the README from a report: `python -m tests.screenshots --run runs/demo --out docs/report.png`.

The head of the page, the verdict and the table of scores, as a reader with a light theme sees them.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from PIL import Image

from grappa_dist.files import write_bytes
from tests.chromium import browsing

WIDTH = 1200  # pixels
COLOURS = 128  # of the picture's palette: a page has few, and the file stays small
_LAST = "#scores table"  # what the picture ends with


def picture(report: Path) -> bytes:
    """A PNG of the upper part of a report.

    Raises:
        ValueError: there is no such report, or it has no scores.
    """
    if not report.is_file():
        raise ValueError(f"{report}: expected a report; `make demo` makes that of runs/demo")
    with browsing(WIDTH) as tab:
        tab.page.goto(report.resolve().as_uri())
        box = tab.page.locator(_LAST).first.bounding_box() if tab.page.locator(_LAST).count() else None
        if box is None:
            raise ValueError(f"{report}: expected a report with scores")
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": round(box["y"] + box["height"] + 14)}
        drawn = tab.page.screenshot(full_page=True, clip=clip)  # type: ignore[arg-type]
    small, buffer = Image.open(io.BytesIO(drawn)).convert("RGB").quantize(COLOURS), io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="the run directory")
    parser.add_argument("--out", type=Path, default=Path("docs/report.png"))
    asked = parser.parse_args()
    write_bytes(asked.out, picture(asked.run / "report" / "report.html"))


if __name__ == "__main__":
    main()
