"""Writes the report: the scores as JSON and one page that needs nothing but itself."""

from __future__ import annotations

import json
import math
from pathlib import Path

from grappa_dist.report.attention import attention_section
from grappa_dist.report.content import ReportContent, ScoreRow
from grappa_dist.report.gallery import Images
from grappa_dist.report.headline import headline_section
from grappa_dist.report.html import MARK, STYLE
from grappa_dist.report.markup import text
from grappa_dist.report.sections import (
    bad_section,
    clustering_section,
    curve_section,
    gallery_section,
    label_free_section,
    run_section,
)

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # no script runs and nothing is fetched


def write_report(content: ReportContent, out_dir: str | Path) -> None:
    """Writes metrics.json and report.html into a directory that exists."""
    out = Path(out_dir)
    rows = [_json_row(row) for row in content.rows]
    metrics = json.dumps({"rows": rows}, indent=1, allow_nan=False)
    (out / "metrics.json").write_text(metrics + "\n", encoding="utf-8")
    (out / "report.html").write_text(page(content), encoding="utf-8", errors="replace")


def _json_row(row: ScoreRow) -> dict[str, str | int | float | None]:
    """The row with plain numbers; JSON has no NaN, so a score that is not finite becomes null."""

    def plain(value: float) -> float | None:
        return float(value) if math.isfinite(value) else None

    return {
        "model": row["model"],
        "task": row["task"],
        "queries": int(row["queries"]),
        "r_precision": plain(row["r_precision"]),
        "map_at_r": plain(row["map_at_r"]),
        "recall_at_1": plain(row["recall_at_1"]),
    }


def page(content: ReportContent) -> str:
    """The whole page as HTML."""
    images = Images()  # one store, so that an image that several sections show is in the page once
    sections = [
        ("scores", "Retrieval scores", headline_section(content)),
        ("galleries", "Galleries", gallery_section(content, images)),
        ("attention", "Attention", attention_section(content)),
        ("clusterings", "Clusterings", clustering_section(content, images)),
        ("training", "Training", curve_section(content)),
        ("label-free", "Without labels", label_free_section(content)),
        ("bad-images", "Bad images", bad_section(content)),
        ("run", "The run", run_section(content)),
    ]
    if not content.rows:  # then what needs no label comes first
        sections.insert(1, sections.pop(5))
    present = [s for s in sections if s[2]]
    links = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name, _ in present)
    body = "".join(f'<section id="{anchor}"><h2>{name}</h2>{markup}</section>' for anchor, name, markup in present)
    notes = "".join(f"<li>{text(note, 1000)}</li>" for note in content.notes)
    aside = f'<ul class="notes" aria-label="Notes">{notes}</ul>' if notes else ""
    title = text(content.title, 200)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>"
        f"<header>{MARK}<div><h1>{title}</h1>"
        "<p>One image-search model for many tasks, adapted without labels.</p></div></header>"
        f'<nav aria-label="Sections">{links}</nav><main>{aside}{body}{images.definitions()}</main></body></html>\n'
    )
