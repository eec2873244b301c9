"""The report of a run: one self-contained page, the scores as JSON and as plain text."""

from __future__ import annotations

from grappa_dist.report.content import (
    BadRow,
    Clustering,
    ClusterSample,
    ContactSheet,
    Gallery,
    Hit,
    LabelFree,
    Nesting,
    ReportContent,
    ScoreRow,
)
from grappa_dist.report.page import write_report
from grappa_dist.report.scores import console_table

__all__ = [
    "BadRow",
    "ClusterSample",
    "Clustering",
    "ContactSheet",
    "Gallery",
    "Hit",
    "LabelFree",
    "Nesting",
    "ReportContent",
    "ScoreRow",
    "console_table",
    "write_report",
]
