"""The application on Ray Serve: its settings, and two replicas that answer as the application here does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from pydantic import ValidationError

from grappa_dist.distributed.local_ray import LocalRay
from tests.processes import free_address
from tests.serving.served import World, world_in

ray = pytest.importorskip("ray", reason="ray is not installed")
pytest.importorskip("ray.serve", reason="ray[serve] is not installed")


def test_settings_are_checked_before_anything_is_deployed() -> None:
    from grappa_dist.serving.ray_serve import Settings, application

    with pytest.raises(ValidationError, match="replica"):
        Settings.model_validate({"replica": 2})
    with pytest.raises(ValueError, match=r"expected model=\.\.\. and images=\.\.\., or index="):
        application(Settings(model="runs/mine"))
    bound: Any = application(Settings.model_validate({"index": "a,b", "replicas": "3"}))
    assert bound._bound_deployment.num_replicas == 3


@pytest.fixture
def world(tmp_path: Path) -> World:
    return world_in(tmp_path, tmp_path / "keep")


@pytest.fixture
def cluster() -> Iterator[LocalRay]:
    from grappa_dist.config import Resources
    from grappa_dist.distributed.connection import connect

    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            patch.delenv(name, raising=False)
        local = connect(Resources(num_cpus=4))
        assert local is not None
        try:
            yield local
        finally:
            ray.serve.shutdown()
            local.end()


@pytest.mark.long
def test_replicas_answer_as_the_application_here_does(world: World, cluster: LocalRay) -> None:
    from grappa_dist.serving.ray_serve import Settings, application

    settings = Settings(
        model=str(world.folder / "run"),
        images=(str(world.folder / "photos"),),
        keep=str(world.folder / "keep"),
        replicas=2,
        device="cpu",
        batch_size=8,
    )
    host, port = free_address().split(":")
    ray.serve.start(http_options={"host": host, "port": int(port)})
    ray.serve.run(application(settings), name="search", route_prefix="/")
    url, query = f"http://localhost:{port}", world.file("cat/2.png")
    with world.client() as here:
        expected = here.post("/search?k=5", content=query).json()
        assert here.get("/").text == httpx2.get(f"{url}/").text

    own = threading.local()

    def asked(_: int) -> Any:
        if not hasattr(own, "client"):
            own.client = httpx2.Client(timeout=300)
        answer = own.client.post(f"{url}/search?k=5", content=query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(asked, range(64)))
    for answer in answers:
        assert [h["name"] for c in answer["columns"] for h in c["hits"][:1]] == ["cat/2.png"] * 2
        assert answer["weights"]["mean"] == pytest.approx(expected["weights"]["mean"], abs=1e-4)
    for path in ("images/0/..%2f..%2fetc%2fpasswd", "images/0/99", "thumbnails/9/0"):
        assert httpx2.get(f"{url}/{path}").status_code == 404
    assert httpx2.post(f"{url}/search", content=bytes(21 * 2**20), timeout=300).status_code == 413
    assert httpx2.get(f"http://127.0.0.1:{port}/", headers={"Host": "evil.example"}).status_code == 400
    assert ray.serve.status().applications["search"].deployments["search"].replica_states == {"RUNNING": 2}
