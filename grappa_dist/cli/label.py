"""`grappa-dist evaluate --label`: two models compared on images without labels, by answers given on a page."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grappa_dist.cli.with_model import Options, collections_of, places_of
from grappa_dist.console import pluralize
from grappa_dist.output import printable_line

if TYPE_CHECKING:
    from grappa_dist.retrieval.map_images import MapImages

DEPTH = 5  # of precision at k: fewer answers than at 10 tell models apart (docs/experiments.md)
MOST = 100_000  # images
_OF_LABELS = ("queries", "gallery", "distractors", "label_column", "split_column", "csv", "csv_classes", "csv_queries")
_HOST = "127.0.0.1"


def ask(options: Options, settings: Sequence[str]) -> None:
    """Asks on a page until its button "Finish" or Ctrl-C ends it; prints the result.

    Args:
        options: those of `evaluate`; `at` is a list of k, None by default.

    Raises:
        ValueError: an option is about labels; there are no images, one model, or answers that cannot be read.
    """
    from grappa_dist.config import expanded
    from grappa_dist.extras import require
    from grappa_dist.files import write_json
    from grappa_dist.retrieval.answer_file import open_answers
    from grappa_dist.retrieval.labelling import as_json, describe_questions, describe_result, labelling_of

    k = _checked_depth(options)
    require("starlette", "uvicorn", what="--label")
    from grappa_dist.serving.questions import create_app
    from grappa_dist.serving.server import serve, take_port, url_of

    path = Path(expanded(options["answers"], "--answers"))
    with take_port(_HOST, options["port"], public=False) as bound, open_answers(path) as answers:
        labelling = labelling_of(_images(options, settings), options["label"], k)
        print("\n".join(describe_questions(labelling, answers)))
        if len(labelling.same(answers)) < len(labelling.pairs):
            line = f"serving the questions at {url_of(bound)}  (Ctrl-C stops; answers are kept in {path})"
            app = create_app(labelling, answers, finish=lambda: signal.raise_signal(signal.SIGTERM))
            serve(app, bound, lambda: print(printable_line(line), flush=True))
        left = len(labelling.pairs) - len(labelling.same(answers))
        if left:
            print(f"stopped before {pluralize(left, 'question')}; the same command goes on")
        print(describe_result(labelling, answers))
        if options["json"] is not None:
            write_json(options["json"], as_json(labelling, answers))


def _checked_depth(options: Options) -> int:
    """The k of precision at k."""
    needless = [f"--{name.replace('_', '-')}" for name in (*_OF_LABELS, "page") if options[name]]
    if needless:
        raise ValueError(f"{needless[0]} is about labelled images; expected --images alone, or none, beside --label")
    depths = [DEPTH] if options["at"] is None else options["at"]
    if len(depths) != 1 or depths[0] < 1:
        raise ValueError(f"--at {','.join(map(str, depths))}: with --label expected one number of at least 1")
    return int(depths[0])


def _images(options: Options, settings: Sequence[str]) -> MapImages:
    """The images that are given under both models, else those of the run, whose features it has kept."""
    from grappa_dist.config import expanded
    from grappa_dist.retrieval.map_images import images_of_collections, images_of_run
    from grappa_dist.retrieval.opening import OWN_BACKBONE

    if options["images"]:
        with_weights = options | {"gallery": options["gallery_weights"], "keep": None}
        return images_of_collections(collections_of(with_weights, settings, places_of(options["images"])), {}, MOST)
    root = Path(expanded(options["model"], "--model"))
    if not root.is_dir():
        raise ValueError(f"{options['model']}: is no run directory, so it has no images; expected --images PLACE")
    strength = "" if options["strength"] is None else f"--strength {options['strength']}"
    if settings or strength or options["against"] != OWN_BACKBONE:
        what = " ".join(settings) or strength or f"--against {options['against']}"
        raise ValueError(f"{what}: without --images a run is compared with its own backbone; expected --images PLACE")
    return images_of_run(root, MOST)
