"""A small application over drawn photos, for tests of what is served."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from starlette.testclient import TestClient

from grappa_dist.serving.app import create_app
from grappa_dist.serving.limits import Limits
from grappa_dist.serving.searcher import Searcher, open_columns
from grappa_dist.serving.server import engine_of
from tests.retrieval.photos import embedder, model_in, write_photos

BAD = "cat/1.png"
LIMITS = Limits(upload_bytes=200_000, pixels=1_000_000, hits=20)


@dataclass(frozen=True)
class World:
    """Twelve photos, one of which is none, under both models of a run."""

    folder: Path
    names: list[str]
    searcher: Searcher

    def file(self, name: str) -> bytes:
        return (self.folder / "photos" / name).read_bytes()

    def client(self, limits: Limits = LIMITS, *, raises: bool = True) -> TestClient:
        """A client of the application in this process; a context, within which the application runs."""
        app = create_app(self.searcher, engine_of(self.searcher, 4), limits=limits)
        return TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=raises)


def world_in(folder: Path, keep: Path | None = None) -> World:
    names = write_photos(folder / "photos", bad=(BAD,))
    model = embedder(model_in(folder / "run"))
    return World(folder, names, open_columns(model, [str(folder / "photos")], keep))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
