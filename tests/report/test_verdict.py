from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from grappa_dist.report import ReportContent, write_report
from grappa_dist.report.sentences import describe_gain
from grappa_dist.report.verdict import (
    as_json,
    caveats,
    conclusion,
    describe_sureness,
    verdict_lines,
    verdict_section,
    why_exported,
    without_labels,
)
from grappa_dist.verdict import Gain, Verdict


def gain(task: str | None, by: float, half_width: float = 0.004, queries: int = 400, p: float = 0.0005) -> Gain:
    return Gain(task, queries, 20, 0.6 + by, 0.6, by - half_width, by + half_width, p)


def verdict(by: float, *, exported: str = "k=64", asked: str = "auto", half_width: float = 0.004) -> Verdict:
    each = (gain("birds", by + 0.01), gain("cars", by - 0.01))
    chosen = asked in ("auto", "backbone")
    validation = {"backbone": 0.6, "k=64": 0.6 + by} if chosen else {}
    mean = gain(None, by, half_width, 800)
    return Verdict(exported, "k=64", asked, mean, each, validation, 810 * chosen, ("few queries: x (3)",))


@pytest.mark.parametrize(
    ("by", "words"),
    [
        (0.012, "1.2 points above the backbone"),
        (-0.012, "1.2 points below the backbone"),
        (-0.0004, "within 0.1 points of the backbone"),
    ],
)
def test_a_gain_says_on_which_side_of_the_backbone_it_is(by: float, words: str) -> None:
    assert describe_gain(by) == words


def test_how_sure_it_is_names_interval_p_value_and_queries() -> None:
    assert describe_sureness(gain("a", 0.012)) == "95% interval +0.8 to +1.6, p < 0.001, 400 queries"
    assert describe_sureness(gain("a", -0.001, p=0.32, queries=1)) == "95% interval −0.5 to +0.3, p = 0.320, 1 query"


def test_a_better_model_is_called_better_with_its_figures_and_what_next() -> None:
    line = conclusion(verdict(0.012), "runs/mine")
    assert line.startswith("Better than the backbone: k=64 is 1.2 points above the backbone in mean R-Precision over 2")
    assert "(95% interval +0.8 to +1.6, p < 0.001, 800 queries)" in line
    assert "grappa-dist search --model runs/mine" in line


def test_a_task_that_loses_while_the_mean_gains_is_a_caveat_with_what_to_do() -> None:
    found = verdict(0.012)
    losing = replace(found, tasks=(found.tasks[0], gain("cars", -0.016)))
    (note,) = [line for line in caveats(losing) if "worse than the backbone" in line]
    assert note.startswith("worse than the backbone on cars (−1.6); at half the strength of adaptation")
    unsure = replace(found, tasks=(found.tasks[0], gain("cars", -0.016, half_width=0.02)))
    all_lose = replace(losing, mean=gain(None, -0.01))
    many = replace(found, tasks=tuple(gain(f"t{i}", -0.01) for i in range(15)))
    assert not [line for v in (found, unsure, all_lose) for line in caveats(v) if "worse" in line]
    assert any("t11 (−1.0) and 3 more; at half" in line for line in caveats(many))


def test_a_worse_model_is_called_worse_and_not_shown_is_not_better() -> None:
    worse = conclusion(verdict(-0.012, asked="k=64"), "runs/mine")
    assert worse.startswith("Worse than the backbone: k=64 is 1.2 points below the backbone")
    assert "evaluate.export=backbone" in worse
    unsure = conclusion(verdict(0.002, half_width=0.004), "runs/mine")
    assert unsure.startswith("Not shown to be better than the backbone: k=64 is 0.2 points above the backbone")
    # 1,610 * (0.4 / 0.2) ** 2 = 6,440 images have such an interval end at zero, so half of the cases beyond it
    assert "some 14,000 labelled test images (now 1,610) would likely tell" in unsure
    assert "nothing to gain here, it seems" in conclusion(verdict(0.0), "runs/mine")


def test_a_wide_interval_is_never_called_nothing_to_gain() -> None:
    for by in (0.0, 0.002):  # from 10 queries: -18 to +18 points
        line = conclusion(verdict(by, half_width=0.18), "runs/mine")
        assert "nothing to gain" not in line
        assert "more labelled test images (now 1,610), as the interval is wide" in line


def test_where_the_backbone_is_exported_the_last_line_says_so() -> None:
    chosen = conclusion(verdict(-0.012, exported="backbone"), "runs/mine")
    assert "so the exported model is the backbone" in chosen
    assert "k=64 is 1.2 points below the backbone" in chosen
    asked = conclusion(verdict(0.012, exported="backbone", asked="backbone"), "runs/mine")
    assert "The exported model is the backbone, as evaluate.export asks" in asked


def test_the_lines_have_the_mean_each_task_and_the_caveats_and_end_with_the_conclusion() -> None:
    found = verdict(0.012)
    lines = verdict_lines(found, "runs/mine")
    assert lines[-1] == conclusion(found, "runs/mine").replace("−", "-")
    assert "on the queries that took no part in choosing it (810 other queries did)" in lines[0]
    assert re.search(r"mean of 2 tasks  60.0 -> 61.2 +\+1.2 ", lines[1])
    assert [line.split()[0] for line in lines[2:4]] == ["birds", "cars"]
    assert "few queries: x (3)" in lines[4]
    assert "one seed was run" in lines[5]
    alone = replace(found, tasks=(gain("birds", 0.012),), validation={}, validation_queries=0)
    lines = verdict_lines(alone, "runs/mine")
    assert "took no part" not in lines[0]
    assert "birds" in lines[1]
    assert "in R-Precision (" in lines[-1]


def test_without_labels_nothing_is_called_a_score_and_a_command_would_settle_it() -> None:
    for has_test in (True, False):
        lines = without_labels("runs/mine", has_test=has_test)
        assert "Not known" in lines[0]
        assert "label-free figures alone, and none of them is a score" in lines[0]
        assert "Some 200 labelled images" in lines[1]
        assert lines[-1].endswith("grappa-dist evaluate --model runs/mine --images FOLDER")
        assert "--label 200 in place of --images FOLDER" in lines[-1]


def test_the_page_opens_with_the_verdict_and_draws_every_gain(tmp_path: Path) -> None:
    found = verdict(-0.012)
    rows = [
        {"model": model, "task": "birds", "queries": 400, "r_precision": 0.6, "map_at_r": 0.5, "recall_at_1": 0.7}
        for model in ("backbone", "k=64")
    ]
    write_report(ReportContent(title="t", rows=rows, verdict=found), tmp_path)  # type: ignore[arg-type]
    html = (tmp_path / "report.html").read_text()
    assert html.index('id="verdict"') < html.index('id="scores"')
    section = html[html.index('id="verdict"') : html.index('id="scores"')]
    assert "k=64 is 1.2 points below the backbone" in section
    assert section.count("<circle") == 3
    assert re.findall(r'end"[^>]*>([^<]*)</text>', section) == ["−1.2", "−0.2", "−2.2"]
    assert "810 queries chose among 2 models; the other 800" in section
    assert json.loads((tmp_path / "metrics.json").read_text())["verdict"] == json.loads(json.dumps(as_json(found)))


def test_without_labels_the_page_opens_with_what_is_not_known() -> None:
    section = verdict_section(None, has_test=False)
    assert "Not known: whether this model is better than the backbone" in section
    assert "grappa-dist evaluate --model RUN" in section


def test_the_metrics_have_what_the_documents_list() -> None:
    found = as_json(verdict(0.012))
    assert found is not None
    assert found["outcome"] == "better"
    assert found["mean"]["gain"] == pytest.approx(0.012)
    fields = {"task", "queries", "classes", "value", "baseline", "gain", "low", "high", "p_value"}
    assert set(found["mean"]) == set(found["tasks"][0]) == fields
    text = (Path(__file__).parents[2] / "docs" / "evaluate_and_search.md").read_text()
    assert [name for name in [*found, *fields] if f"`{name}`" not in text] == []


def test_an_exported_model_says_why_it_is_the_one() -> None:
    assert why_exported(None, "auto")["reason"].startswith("no labelled test images")
    assert why_exported(verdict(0.01, asked="k=64"), "k=64") == {"export": "k=64", "reason": "asked for"}
    why = why_exported(verdict(0.01), "auto")
    assert "on 810 labelled test queries" in why["reason"]
    assert why["validation"]["backbone"] == 0.6
