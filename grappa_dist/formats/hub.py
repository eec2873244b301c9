"""A model folder as the Hugging Face Hub lays it out: with a model card of what its run is known to be, and no more.

Nothing is uploaded; the card has the command.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from grappa_dist._compat import declare_torchvision_ops
from grappa_dist.config import CONFIG_FILE
from grappa_dist.console import pluralize
from grappa_dist.data.transforms import INTERPOLATIONS
from grappa_dist.files import read_json, write_json, write_utf8
from grappa_dist.formats.checking import Check
from grappa_dist.output import printable_line
from grappa_dist.variants import BACKBONE

CARD, PREPROCESSOR = "README.md", "preprocessor_config.json"
UNKNOWN = "unknown: look it up"
_DEMO = "grappa_dist.demo.backbone:create"
_LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc0-1.0")  # as the Hub calls them
_METRICS = {"r_precision": "R-Precision", "map_at_r": "MAP@R", "recall_at_1": "recall@1"}


@dataclass(frozen=True)
class Facts:
    """What a model card states."""

    config: Mapping[str, Any]  # of the exported model
    about: Mapping[str, Any]  # preprocessing, numbers, versions
    check: Check
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the run, as far as they are not the defaults
    counts: Mapping[str, int] = field(default_factory=dict)  # of images: train, test
    rows: Sequence[Mapping[str, Any]] = ()  # of the table of scores: of this model, and of the backbone
    verdict: Mapping[str, Any] | None = None  # where it is about this model
    own_weights: bool | None = None  # whether the backbone's weights are a file of the user's; None: not known


def facts_of(source: Path, config: Mapping[str, Any], about: Mapping[str, Any], check: Check) -> Facts:
    """What is known of a model: of a folder without its run, that is the model alone."""
    if not (source / CONFIG_FILE).is_file():
        return Facts(config, about, check)
    from grappa_dist.run_models import image_counts
    from grappa_dist.stages.run import read_config

    settings = read_config(source)
    private = {"data": ..., "resources": ..., "out": ..., "backbone": {"checkpoint"}}
    shown = settings.model_dump(mode="json", exclude_defaults=True, exclude=private)  # type: ignore[arg-type]
    name, path = config["variant"], source / "report" / "metrics.json"
    metrics = read_json(path) if path.is_file() else {}
    verdict = metrics.get("verdict")
    return Facts(
        config,
        about,
        check,
        shown,
        image_counts(source),
        [row for row in metrics.get("rows", ()) if row["model"] in (name, BACKBONE)],
        verdict if verdict and verdict["compared"] == name else None,
        settings.backbone.checkpoint is not None,
    )


def write(folder: Path, facts: Facts) -> None:
    """Writes the card and the description of the preprocessing into a model folder.

    Raises:
        ValueError: the Hub's own parser does not read the card.
    """
    write_json(folder / PREPROCESSOR, preprocessor(facts.about["preprocess"]))
    text = card(facts)
    from huggingface_hub import ModelCard

    ModelCard(text)  # raises for metadata that the Hub would refuse
    write_utf8(folder / CARD, text)


def preprocessor(given: Mapping[str, Any]) -> dict[str, Any]:
    """The preprocessing by the names that the Hub's image processors use; the model itself normalises."""
    side = {"height": given["image_size"], "width": given["image_size"]}
    crops = given["resize"] == "crop"
    return {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": math.floor(given["image_size"] / given["crop_share"])} if crops else side,
        "resample": int(INTERPOLATIONS[given["interpolation"]]),
        "do_center_crop": crops,
        **({"crop_size": side} if crops else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
        "image_mean": list(given["mean"]),
        "image_std": list(given["std"]),
    }


def licence_of(facts: Facts) -> tuple[str, str]:
    """The licence of the backbone's weights, or UNKNOWN, and where that is from."""
    name = str(facts.config["backbone"]["name"])
    if name == _DEMO:
        return "apache-2.0", "of grappa-dist, whose demo backbone it is"
    found = _timms(name)
    if facts.own_weights or found is None or not found.license:
        return UNKNOWN, "the weights are of a file, or a module, that this program knows nothing of"
    if facts.own_weights is None:
        return UNKNOWN, f"without its run it is not known whose weights these are; timm's have {code(found.license)}"
    return str(found.license), f"as timm {facts.about['versions']['timm']} has it; the authors' own page decides"


def _timms(name: str) -> Any:
    """timm's description of pretrained weights, None of other backbones."""
    source, _, model = name.partition(":")
    if source != "timm":
        return None
    declare_torchvision_ops()
    import timm

    return timm.get_pretrained_cfg(model)


def card(facts: Facts) -> str:
    """The model card, README.md of a repository: metadata in YAML, then Markdown."""
    sections = (_what(facts), _use(facts), _data(facts), _scores(facts), _limits(facts), _made(facts), _upload())
    head = yaml.safe_dump(_metadata(facts), sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n" + "\n\n".join("\n".join(section) for section in sections) + "\n"


def _metadata(facts: Facts) -> dict[str, Any]:
    licence, _ = licence_of(facts)
    found: dict[str, Any] = {"library_name": "grappa-dist", "pipeline_tag": "image-feature-extraction"}
    if licence in _LICENCES:
        found["license"] = licence
    elif licence == UNKNOWN:
        found["license"] = "unknown"
    else:
        found |= {"license": "other", "license_name": printable_line(licence)}
    timms = _timms(str(facts.config["backbone"]["name"]))
    if timms is not None and timms.hf_hub_id and facts.own_weights is False:
        found["base_model"] = timms.hf_hub_id
    return {**found, "tags": ["image-retrieval", "image-similarity", "vision-transformer", "grappa"]}


def code(text: object) -> str:
    """A text from data as a code span, within a table too: no markup in it, and it stays one line."""
    return "`" + printable_line(str(text)).replace("`", "'").replace("|", "\\|")[:200] + "`"


def plain(text: object) -> str:
    """A sentence from data as Markdown without markup, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", printable_line(str(text)))


def _what(facts: Facts) -> Iterator[str]:
    config, licence = facts.config, licence_of(facts)
    sets = ", ".join(map(code, config["sets"])) or "none: it is the backbone alone"
    yield f"# {_title(facts)}"
    yield ""
    yield "Turns images into unit vectors whose dot products are cosines, for retrieval over several tasks at once: a"
    yield "frozen vision transformer with adaptors that were trained without labels, by the method of"
    yield "[Grappa](https://arxiv.org/abs/2210.02254) (Almazán et al., ECCV 2022) as grappa-dist implements it."
    yield ""
    yield f"- Variant: {code(config['variant'])}. Adaptor sets: {sets}"
    if "strength" in config:
        yield f"- Strength of adaptation: {config['strength']:g}, where 0 is the backbone and 1 the model as trained"
    yield f"- Backbone: {code(config['backbone']['name'])}, whose weights are in `model.safetensors`"
    yield f"- Licence of the backbone: {code(licence[0])} ({licence[1]})"
    yield f"- Numbers: {facts.about['dtype']}"


def _title(facts: Facts) -> str:
    return f"{code(facts.config['variant'])} of {code(facts.config['backbone']['name'])}"


def _use(facts: Facts) -> Iterator[str]:
    name = str(facts.config["backbone"]["name"])
    own = not name.startswith("timm:") and name != _DEMO
    trust = ", trust_modules=True" if own else ""
    yield "## Use"
    yield ""
    yield "```python"
    yield "from PIL import Image"
    yield "from grappa_dist import load_model  # pip install grappa-dist"
    yield ""
    yield f'model = load_model("."{trust})  # this folder, or a copy that huggingface_hub.snapshot_download made'
    yield 'embedding = model(model.transform(Image.open("photo.jpg"))[None])  # (1, D), a unit vector'
    yield "```"
    if own:
        yield ""
        yield f"The backbone is built by {code(name)}, a module that must be importable, and that loading runs."
    yield ""
    yield "`model.transform` does what `preprocessor_config.json` states:"
    yield "; ".join(facts.about["preprocess"]["steps"]) + "."
    yield "Normalisation by mean and standard deviation happens inside of the model."


def _data(facts: Facts) -> Iterator[str]:
    yield "## Data"
    yield ""
    if not facts.counts:
        yield "Not known: this folder was made of a model without its run."
        return
    tasks = sorted({str(row["task"]) for row in facts.rows})
    yield f"- Adapted to {pluralize(facts.counts['train'], 'image')}, without labels"
    if "test" in facts.counts:
        yield f"- Test images: {facts.counts['test']:,}"
    yield f"- Tasks with labelled test images: {', '.join(map(code, tasks)) or 'none'}"
    yield "- What the images are, and their licence: to be added by whoever made the model"


def _scores(facts: Facts) -> Iterator[str]:
    yield "## Scores"
    yield ""
    own = {str(row["task"]): row for row in facts.rows if row["model"] == facts.config["variant"]}
    if not own:
        yield "Not known: no labelled test images were scored with it. `grappa-dist evaluate` scores it on yours."
        return
    before = {str(row["task"]): row for row in facts.rows if row["model"] == BACKBONE}
    yield "Percent. Every test image is a query among the others of its task; in brackets the frozen backbone."
    yield ""
    yield f"| task | queries | {' | '.join(_METRICS.values())} |"
    yield "|---|---|---|---|---|"
    for task, row in own.items():
        figures = " | ".join(f"{_percent(row, m)} ({_percent(before.get(task, {}), m)})" for m in _METRICS)
        yield f"| {code(task)} | {int(row['queries']):,} | {figures} |"
    yield from _gains(facts.verdict)


def _percent(row: Mapping[str, Any], metric: str) -> str:
    value = row.get(metric)
    return "-" if value is None else f"{100 * float(value):.1f}"


def _gains(verdict: Mapping[str, Any] | None) -> Iterator[str]:
    """The gain over the backbone with its interval, where the run's verdict is about this model."""
    yield ""
    if verdict is None:
        yield "Intervals: not known, as the run's verdict is about another model; `grappa-dist evaluate` gives them."
        return
    yield "Gain in R-Precision over the backbone, in points, with 95 % bootstrap intervals over queries:"
    yield ""
    yield "| task | queries | gain | interval | p |"
    yield "|---|---|---|---|---|"
    for gain in (*verdict["tasks"], verdict["mean"]):
        task = "mean over tasks" if gain["task"] is None else code(gain["task"])
        low, high = (f"{100 * float(gain[end]):+.1f}" for end in ("low", "high"))
        yield (
            f"| {task} | {int(gain['queries']):,} | {100 * float(gain['gain']):+.1f} | {low} to {high} | "
            f"{float(gain['p_value']):.3f} |"
        )


def _limits(facts: Facts) -> Iterator[str]:
    side = facts.about["preprocess"]["image_size"]
    yield "## Limits"
    yield ""
    yield f"- It sees {side} x {side} pixels: what is smaller than that shows is not seen."
    yield "- It was adapted to one collection. How it does on other images is not known before it is evaluated on them."
    yield "- What the backbone and the training images are biased towards is in the embeddings; nothing corrects it."
    for caveat in (facts.verdict or {}).get("caveats", ()):
        yield f"- Of the scores: {plain(caveat)}"


def _made(facts: Facts) -> Iterator[str]:
    check, versions = facts.check, facts.about["versions"]
    yield "## How it was made"
    yield ""
    yield f"By {', '.join(f'{name} {version}' for name, version in versions.items())}."
    yield f"Embeddings by this folder have a minimum cosine of {check.min_cosine:.6f} with those of the"
    yield f"model in float32, on {pluralize(check.images, 'image')} ({check.source})."
    if facts.settings:
        yield "Settings that are not the defaults, `grappa-dist run photos/ --config FILE`, without places of data:"
        yield ""
        yield "```yaml"
        yield yaml.safe_dump(dict(facts.settings), sort_keys=False).rstrip().replace("```", "'''")
        yield "```"


def _upload() -> Iterator[str]:
    yield "## Upload"
    yield ""
    yield "Nothing of this was uploaded. `hf upload USER/NAME .` in this folder does that, once the card is complete."
