"""The same application as a deployment of Ray Serve: replicas that each hold the models, and Ray's own batching.

    serve run grappa_dist.serving.ray_serve:application model=/shared/runs/mine images=/shared/photos keep=/shared/kept

Every replica opens the models and the embeddings itself. Where `keep` names a folder, the first start of one process
writes it (`grappa-dist serve --keep`, or one replica), and the others read it.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve
from starlette.applications import Starlette

from grappa_dist.console import Console
from grappa_dist.retrieval import BATCH_SIZE, DECODE_THREADS
from grappa_dist.retrieval.embedding import Embedder
from grappa_dist.retrieval.opening import open_model
from grappa_dist.serving.app import LOOPBACK_NAMES, Answering, Engine, create_app
from grappa_dist.serving.limits import Limits
from grappa_dist.serving.searcher import Answer, Query, Searcher, open_columns, open_indexes

NAME = "search"
REQUESTS = 64  # of one replica at a time; others wait in Ray's proxy
QUEUED = 256  # that wait there; more are answered by 503


class Settings(BaseModel):
    """What the deployment serves, and how; `key=value` of `serve run`, or `args` of a config of `serve deploy`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    images: tuple[str, ...] | str = ()
    keep: str | None = None
    index: tuple[str, ...] | str = ()
    hosts: tuple[str, ...] | str = LOOPBACK_NAMES  # names that requests may call the cluster by; "*": any
    device: str = "auto"
    replicas: int = 1
    cpus: float = 1.0  # of a replica
    gpus: float = 0.0
    batch_size: int = BATCH_SIZE
    decode_threads: int = DECODE_THREADS


def application(settings: Settings) -> serve.Application:
    """The application, for `serve run`, `serve deploy` and `ray.serve.run`.

    Raises:
        ValueError: neither an index nor a model and images are named.
    """
    if not settings.index and not (settings.model and settings.images):
        raise ValueError("expected model=... and images=..., or index=...")
    deployment: Any = serve.deployment(
        name=NAME,
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        max_ongoing_requests=REQUESTS,
        max_queued_requests=QUEUED,
    )
    return deployment(serve.ingress(lambda: _built(settings))()).bind()  # built in each replica


def _built(settings: Settings) -> Starlette:
    searcher = _opened(settings)
    return create_app(
        searcher,
        Engine(batched(searcher, settings.batch_size)),
        limits=Limits(),
        hosts=_several(settings.hosts),
        threads=settings.decode_threads,
    )


def _opened(settings: Settings) -> Searcher:
    if settings.index:
        return open_indexes(_several(settings.index), settings.model, settings.device)
    assert settings.model is not None
    model = open_model(settings.model, settings.device)
    embedder = Embedder(model, Console(), settings.batch_size, settings.decode_threads)
    return open_columns(embedder, _several(settings.images), Path(settings.keep) if settings.keep else None)


def _several(given: tuple[str, ...] | str) -> tuple[str, ...]:
    return tuple(given.split(",")) if isinstance(given, str) else given


def batched(searcher: Searcher, most: int) -> Answering:
    """Answers by Ray's batching, in a thread: queries that come while a batch is computed are the next one."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="batches")

    @serve.batch(max_batch_size=most, batch_wait_timeout_s=0)
    async def answer(queries: list[Query]) -> list[Answer | Exception]:
        return await asyncio.get_running_loop().run_in_executor(thread, searcher.answer, queries)

    async def one(query: Query) -> Answer:
        found: Answer | Exception = await answer(query)
        if isinstance(found, Exception):
            raise found
        return found

    return one
