"""The score table as text."""

from __future__ import annotations

from grappa_dist.report import ScoreRow, console_table


def row(model: str, task: str, value: float, queries: int = 10) -> ScoreRow:
    return ScoreRow(
        model=model,
        task=task,
        queries=queries,
        r_precision=value,
        map_at_r=value / 2,
        recall_at_1=min(1.0, value * 1.5),
    )


def table(tasks: list[str]) -> str:
    values = {"backbone": 0.3, "k=1024": 0.42, "k=64": 0.35, "oracle": 0.42, "average": 0.25, "neighbours-adam": 0.36}
    return console_table([row(model, task, value) for model, value in values.items() for task in tasks])


def test_the_best_of_a_task_is_marked_and_the_oracle_does_not_compete() -> None:
    block = table(["cars"]).split("\n\nR-Precision above")[0]
    marked = [line for line in block.splitlines()[1:] if "*" in line]
    assert [line.split() for line in marked] == [["k=1024", "42.0*/21.0"]]


def test_a_perfect_score_and_its_star_fit_their_column() -> None:
    perfect = [{**row("backbone", f"t{i}", 1.0), "map_at_r": 1.0} for i in range(6)]
    text = console_table(perfect)  # type: ignore[arg-type]
    assert text.startswith("R-Precision / MAP@R, percent (* best R-Precision of its column)\n")
    assert text.count("100.0*/100.0") == 7
    assert max(map(len, text.splitlines())) <= 120


def test_ties_at_the_precision_shown_are_all_marked() -> None:
    text = console_table([row("backbone", "t", 0.40001), row("average", "t", 0.40002), row("k=2", "t", 0.1)])
    assert text.count("40.0*/20.0") == 2


def test_models_go_from_the_backbone_over_sets_by_size_to_fusions() -> None:
    block = table(["cars"]).split("\n\nR-Precision above")[0]
    names = [line.split()[0] for line in block.splitlines()[2:] if line]
    assert names == ["backbone", "k=64", "k=1024", "oracle", "average", "neighbours-adam"]


def test_a_fusion_goes_from_weak_to_full_strength_and_its_names_are_not_cut() -> None:
    names = ["neighbours-adam@0.25", "neighbours-adam", "average", "average@0.5", "neighbours-adam@0.125", "average@0"]
    tasks = [f"a_task_with_quite_a_long_name_{i}" for i in range(6)]
    text = console_table([row(model, task, 0.4) for model in names for task in tasks])
    assert max(map(len, text.splitlines())) <= 120
    shown = [line.split()[0] for line in text.split("\n\n")[0].splitlines()[2:]]
    fusions = ["average@0", "average@0.5", "average", *names[4:5], *names[:2]]
    assert shown == fusions


def test_gains_over_the_backbone_are_signed_points() -> None:
    gains = table(["cars"]).split("\n\nR-Precision above")[1]
    assert "+12.0" in gains
    assert "-5.0" in gains


def test_gains_are_the_differences_of_the_scores_shown() -> None:
    text = console_table([row("backbone", "t", 0.58251), row("average", "t", 0.58249)])
    assert "58.3*/29.1" in text
    assert "58.2/29.1" in text
    assert text.split("above the backbone (-: below it)")[1].split("recall")[0].split()[-2:] == ["average", "-0.1"]


def test_six_tasks_with_long_names_fit_a_terminal_and_columns_line_up() -> None:
    lines = table([f"a_task_with_quite_a_long_name_{i}" for i in range(6)]).splitlines()
    assert max(map(len, lines)) <= 120
    scores = [line for line in lines if line.startswith(("backbone", "k=", "average")) and "/" in line]
    assert len({tuple(i for i, c in enumerate(line) if c == "/") for line in scores}) == 1


def test_many_tasks_go_below_each_other() -> None:
    text = table([f"t{i}" for i in range(30)])
    assert max(map(len, text.splitlines())) <= 120
    assert all(f"t{i}" in text.split() for i in range(30))


def test_control_characters_of_a_task_never_reach_the_terminal() -> None:
    text = console_table([row("backbone", "evil\x1b[2J\n\u202e", 0.5)])
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "evil?[2J" in text


def test_a_task_without_queries_and_a_missing_row_show_a_dash() -> None:
    rows = [row("backbone", "a", 0.0, queries=0), row("backbone", "b", 0.5), row("k=8", "b", float("nan"))]
    text = console_table(rows)
    assert "nan" not in text
    assert "–" in text
    assert "50.0*/25.0" in text


def test_a_table_without_a_backbone_has_no_gains() -> None:
    assert "above the backbone" not in console_table([row("average", "a", 0.5)])


def test_rows_trained_with_labels_are_named_come_last_and_do_not_compete() -> None:
    values = {"supervised": 0.9, "supervised-set": 0.8, "random-all": 0.3, "random-one": 0.2, "average": 0.5}
    table = console_table([row(model, "t", value) for model, value in values.items()])
    block = table.split("\n\nrecall@1")[0]
    names = [line.split()[0] for line in block.splitlines()[2:] if line]
    assert names == ["average", "random-one", "random-all", "supervised-set", "supervised"]
    assert [line.split()[0] for line in block.splitlines()[1:] if "*" in line] == ["average"]
    assert table.endswith("Trained with labels, out of competition: supervised-set, supervised. No other row was.")
    assert "Trained with labels" not in console_table([row("average", "t", 0.5)])
