"""The tables of docs/settings.md, from the schema in config.py. `python -m tests.settings_page` writes them again.

A setting's name, default and values are the schema's, its meaning is the comment beside it. Where a default comes from
and what is made again after a change stand here, since no code needs them.
"""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from typing import Any

from grappa_dist import config
from tests.structure import ROOT, TREES

PAGE, SOURCE = ROOT / "docs" / "settings.md", "grappa_dist/config.py"
TABLE = re.compile(r"(<!-- settings of (\w[\w ]*) -->\n).*?(?=<!-- end -->)", re.DOTALL)
TOP = "the top level"
BAR = r"\|"  # that ends no cell
PAPER, BARLOW_TWINS, OURS = "paper", "BT", "ours"
ORIGINS = {  # of defaults that belong to the method; all others are ours in the method's sections, else none
    "adapt.learning_rate": PAPER,
    "adapt.weight_decay": PAPER,
    "adapt.supervised": PAPER,
    "fuse.variants": PAPER,
    "fuse.refresh": PAPER,
    "fuse.lars_learning_rate": PAPER,
    "fuse.lars_weight_decay": PAPER,
    "fuse.projector": BARLOW_TWINS,
    "fuse.beta": BARLOW_TWINS,
    "fuse.loss_scale": BARLOW_TWINS,
    "data.streams": OURS,
    "data.shuffle_window": OURS,
    "backbone.resize": OURS,
    "backbone.interpolation": OURS,
}
SECTIONS_OF_THE_METHOD = ("embed", "clustering", "adapt", "fuse")
NOT_OF_THE_METHOD = (*("checkpoint_steps", "sets_per_job", "micro_batch", "activation_checkpointing", "zero_stage"),)
STAGES = {  # the first stage whose artefacts are made again
    **dict.fromkeys((TOP, "resources"), "report only"),
    **dict.fromkeys(("data", "backbone", "embed"), "embed"),
    "clustering": "pseudo_label",
    "adapt": "adapt",
    "fuse": "fuse",
    "evaluate": "report",
}
RESULTS = {
    "seed": "pseudo_label",
    "data.test": "evaluate",
    "evaluate.strengths": "its rows",
    "data.max_bad_share": "no",
    "data.shards_dir": "no",
    "data.label_field": "evaluate",
    "data.label_member": "evaluate",
    "data.exclude": "pseudo_label",
    "data.duplicates": "adapt",
    "data.streams": "adapt",
    "data.shuffle_window": "adapt",
    "adapt.supervised": "its row",
    "fuse.variants": "its rows",
    "evaluate.export": "model",
}


def comments() -> dict[tuple[str, str], str]:
    """(class, setting) -> what the comments above and beside it say."""
    lines = (ROOT / SOURCE).read_text()
    at = {
        token.start[0]: (token.string.removeprefix("#").strip(), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(lines).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for section in ast.walk(TREES[SOURCE]):
        for field in section.body if isinstance(section, ast.ClassDef) else ():
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                first, last = field.lineno, field.end_lineno or field.lineno
                while at.get(first - 1, ("", False))[1]:  # lines that are comments alone
                    first -= 1
                said = [at[line][0] for line in range(first, last + 1) if line in at]
                found[section.name, field.target.id] = " ".join(said)
    return found


def values(schema: dict[str, Any]) -> str:
    """What a setting may be, for the table."""
    if "anyOf" in schema:
        return " or ".join(values(part) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "any")
    if kind == "array":
        items = schema.get("prefixItems")
        return f"{len(items)} numbers" if items else f"list of {values(schema['items'])}"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    stated = [f"{sign} {schema[key]:g}" for key, sign in bounds.items() if key in schema]
    word = {"string": "text", "object": "mapping", "boolean": "`true`, `false`", "null": "`null`"}.get(kind, kind)
    return " ".join([word, *([" and ".join(stated)] if stated else [])])


def default(schema: dict[str, Any], required: bool) -> str:
    """The default as YAML on one line has it."""
    if required:
        return "required"
    value = schema["default"]
    words = [f"{v:g}" if isinstance(v, float) else v if isinstance(v, str) else json.dumps(v) for v in flat(value)]
    return f"`[{', '.join(words)}]`" if isinstance(value, list) else f"`{words[0]}`"


def flat(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def rows(section: str) -> list[str]:
    """The lines of a section's table."""
    kind: Any = config.Config if section == TOP else config.Config.model_fields[section].annotation
    schema, said = kind.model_json_schema(), comments()
    found = []
    for name, of_field in schema["properties"].items():
        if section == TOP and kind.model_fields[name].annotation in config.Section.__subclasses__():
            continue
        key = name if section == TOP else f"{section}.{name}"
        by_default = OURS if section in SECTIONS_OF_THE_METHOD and name not in NOT_OF_THE_METHOD else "-"
        result = RESULTS.get(key, "no" if name in NOT_OF_THE_METHOD else STAGES[section])
        cells = [
            f"`{name}`",
            default(of_field, name in schema.get("required", ())),
            values(of_field),
            said[kind.__name__, name],
            ORIGINS.get(key, by_default),
            result,
        ]
        found.append(f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |")
    return found


def written(page: str) -> str:
    """The page with its tables as the schema has them."""
    head = "| setting | default | values | meaning | from | result |\n|---|---|---|---|---|---|\n"
    return TABLE.sub(lambda found: found[1] + head + "\n".join(rows(found[2])) + "\n", page)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
