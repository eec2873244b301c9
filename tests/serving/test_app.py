"""Requests and their answers: what is found, what is refused, and that nothing but the collection can be read."""

from __future__ import annotations

import asyncio
import io
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from grappa_dist.serving.app import create_app
from grappa_dist.serving.server import engine_of
from tests.serving.served import BAD, LIMITS, World, encoded, world_in


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world_in(tmp_path_factory.mktemp("world"))


@pytest.fixture
def client(world: World) -> Iterator[TestClient]:
    with world.client() as client:
        yield client


def png_that_says(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes with the header of another size."""
    plain = encoded(Image.new("L", (1, 1)), "PNG")
    header = struct.pack(">II", width, height) + plain[24:29]
    return plain[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + plain[33:]


def test_both_columns_find_the_image_itself_first_and_the_weights_sum_to_one(client: TestClient, world: World) -> None:
    answer = client.post("/search?k=3", content=world.file("cat/2.png"))
    assert answer.status_code == 200
    found = answer.json()
    assert [column["model"] for column in found["columns"]] == ["backbone", "neighbours"]
    for column in found["columns"]:
        assert column["hits"][0]["name"] == "cat/2.png"
        assert column["hits"][0]["cosine"] == pytest.approx(1, abs=1e-5)
        assert len(column["hits"]) == 3
    assert found["weights"]["sets"] == ["k=0", "k=1"]
    layers = np.array(found["weights"]["layers"])
    assert layers.shape == (2, 2)
    np.testing.assert_allclose(layers.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(found["weights"]["mean"], layers.mean(0), atol=1e-5)
    assert found["query"] == {"width": 36, "height": 40}


def test_all_hits_are_images_that_can_be_seen_and_the_bad_one_is_none(client: TestClient, world: World) -> None:
    hits = client.post("/search?k=20", content=world.file("cat/0.png")).json()["columns"][1]["hits"]
    assert len(hits) == len(world.names) - 1
    assert BAD not in {hit["name"] for hit in hits}
    for hit in hits:
        thumbnail, original = client.get(f"/{hit['thumbnail']}"), client.get(f"/{hit['image']}")
        assert Image.open(io.BytesIO(thumbnail.content)).format == "JPEG"
        name = hit["name"].replace("\\n", "\n")  # as it is shown
        assert original.content == world.file(name)
        assert original.headers["content-type"] == "image/png"
        assert original.headers["content-security-policy"] == "default-src 'none'; sandbox"
        assert original.headers["content-disposition"] == f"inline; filename*=UTF-8''{name.partition('/')[2]}"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_every_type_that_a_run_reads_is_searched(kind: str, client: TestClient, world: World) -> None:
    image = Image.open(io.BytesIO(world.file("anemone/0.png"))).convert("RGB")
    answer = client.post("/search?k=1", content=encoded(image, kind))
    assert answer.status_code == 200, answer.text
    assert answer.json()["columns"][0]["hits"][0]["name"].startswith("anemone/")


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        (b"", 415, "the request has no body"),
        (b"no image", 415, "cannot be read: no JPEG"),
        (SVG, 415, "it begins with '<svg xmlns="),
        (b"%PDF-1.7\n", 415, "cannot be read"),
        (b"\xff\xd8\xff", 415, "cannot be read"),
        (bytes(LIMITS.upload_bytes), 415, "cannot be read"),
        (bytes(LIMITS.upload_bytes + 1), 413, "the image has more than 0.191 MiB"),
        (png_that_says(1001, 1000), 422, "1001 x 1000 pixels; 1 million are decoded at most"),
        (png_that_says(60_000, 60_000), 415, "cannot be read"),
        (png_that_says(0, 7), 415, "cannot be read"),
        (encoded(Image.new("L", (1100, 1000)), "GIF"), 422, "1100 x 1000 pixels"),
        (encoded(Image.new("L", (1100, 1000)), "JPEG"), 422, "1100 x 1000 pixels"),
        (encoded(Image.new("1", (1100, 1000)), "TIFF", compression="group4"), 422, "1100 x 1000 pixels"),
        (encoded(Image.new("RGB", (1100, 1000)), "WEBP"), 422, "1100 x 1000 pixels"),
    ],
)
def test_what_is_no_image_or_too_large_is_refused_with_the_reason(
    body: bytes, status: int, why: str, client: TestClient
) -> None:
    answer = client.post("/search", content=body)
    assert (answer.status_code, list(answer.json())) == (status, ["error"])
    assert why in answer.json()["error"]
    assert "\n" not in answer.json()["error"]


def test_every_truncation_of_an_image_is_an_answer_or_a_reason(client: TestClient, world: World) -> None:
    image = Image.open(io.BytesIO(world.file("cat/0.png"))).convert("RGB")
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        whole = encoded(image, kind)
        for share in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
            answer = client.post("/search", content=whole[: int(share * len(whole))])
            assert answer.status_code in (200, 415), (kind, share, answer.text)


def test_a_body_without_a_length_is_counted_while_it_is_read(client: TestClient) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield bytes(50_000)

    assert client.post("/search", content=endless()).status_code == 413
    assert client.post("/search", content=b"x", headers={"Content-Length": "99999999"}).status_code == 415


@pytest.mark.parametrize("k", ["0", "-1", "21", "1e1", "٣", "9" * 5000, ""])
def test_a_wrong_number_of_hits_is_refused(k: str, client: TestClient, world: World) -> None:
    answer = client.post("/search", params={"k": k}, content=world.file("cat/0.png"))
    assert answer.status_code == 400
    assert answer.json()["error"].endswith("expected a number from 1 to 20")


@pytest.mark.parametrize(
    "path",
    [
        "/images/0/11/../../../../etc/passwd",
        "/images/0/..%2f..%2f..%2fetc%2fpasswd",
        "/images/0/%2e%2e/%2e%2e/etc/passwd",
        "/images/0//etc/passwd",
        "/images/etc/passwd",
        "/images/0/12",
        "/images/0/-1",
        "/images/2/0",
        "/images/-1/0",
        "/images/0/1.0",
        "/images/0/1%00",
        "/images/0/١",
        f"/images/0/{'9' * 5000}",
        "/thumbnails/0/12",
        "/thumbnails/0/..%2f..%2fphotos%2fcat%2f0.png",
        "/page.py",
        "/app.py",
        "/../app.py",
        "/static/../app.py",
        "/openapi.json",
    ],
)
def test_no_path_leads_out_of_the_collection(path: str, client: TestClient) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert list(answer.json()) == ["error"]


def test_the_bad_row_is_not_served_though_its_file_is_there(client: TestClient, world: World) -> None:
    row = world.names.index(BAD)
    assert [client.get(f"/{what}/0/{row}").status_code for what in ("images", "thumbnails")] == [404, 404]


def test_a_file_that_became_something_else_is_not_served(tmp_path: Path) -> None:
    own = world_in(tmp_path)
    (own.folder / "photos" / "cat" / "0.png").write_text("secret")
    (own.folder / "photos" / "cat" / "2.png").unlink()
    (own.folder / "photos" / "cat" / "3.png").write_bytes(SVG)
    with own.client() as client:
        for name in ("cat/0.png", "cat/2.png", "cat/3.png"):
            for what in ("images", "thumbnails"):
                answer = client.get(f"/{what}/1/{own.names.index(name)}")
                assert answer.status_code == 404
                assert answer.json() == {"error": "the image is no longer there, or is none any more"}


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "127.0.0.1/x", "[::2]"]
)
def test_a_host_of_another_name_is_refused(host: str, client: TestClient, world: World) -> None:
    assert client.get("/", headers={"Host": host}).status_code == 400
    assert client.post("/search", content=world.file("cat/0.png"), headers={"Host": host}).status_code == 400


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]", "[::1]:8000"])
def test_the_loopback_is_a_host_by_each_of_its_names(host: str, client: TestClient) -> None:
    assert client.get("/health", headers={"Host": host}).json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("POST", {"Origin": "http://evil.example"}, 403),
        ("POST", {"Origin": "null"}, 403),
        ("POST", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 403),
        ("GET", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ("GET", {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"}, 403),
        ("GET", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),
        ("POST", {"Origin": "http://127.0.0.1", "Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
def test_pages_of_other_sites_get_no_answer(
    method: str, headers: dict[str, str], status: int, client: TestClient, world: World
) -> None:
    path, body = ("/search", world.file("cat/0.png")) if method == "POST" else ("/", b"")
    answer = client.request(method, path, content=body, headers=headers)
    assert answer.status_code == status
    assert "access-control-allow-origin" not in answer.headers


def test_every_answer_has_the_policy(client: TestClient) -> None:
    for method, path in (
        ("GET", "/"),
        ("GET", "/page.js"),
        ("GET", "/nothing"),
        ("PUT", "/search"),
        ("POST", "/search"),
    ):
        headers = client.request(method, path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
    assert client.get("/", headers={"Host": "evil.example"}).headers["x-frame-options"] == "DENY"


def test_a_form_is_refused_with_what_is_expected(client: TestClient, world: World) -> None:
    answer = client.post("/search", files={"file": world.file("cat/0.png")})
    assert answer.status_code == 415
    assert "expected the bytes of the image as the body" in answer.json()["error"]


def test_what_is_searched_and_taken_is_told(client: TestClient) -> None:
    about = client.get("/about").json()
    assert [(c["model"], c["images"], c["left_out"]) for c in about["columns"]] == [
        ("backbone", 11, 1),
        ("neighbours", 11, 1),
    ]
    assert about["sets"] == ["k=0", "k=1"]
    assert about["limits"] == {"upload_bytes": 200_000, "pixels": 1_000_000, "hits": 20}


async def _call(app: Any, scope: dict[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What an application sends; after its messages the client stays silent."""
    sent = list[dict[str, Any]]()

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(dict(message))

    await app(scope, receive, send)
    return sent


def test_a_client_that_stops_sending_is_answered_in_the_end(world: World) -> None:
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/search",
        "raw_path": b"/search",
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
        "http_version": "1.1",
        "root_path": "",
    }
    for limits, status in ((replace(LIMITS, read_s=0.01), 408), (replace(LIMITS, answer_s=0.01), 503)):
        app = create_app(world.searcher, engine_of(world.searcher, 4), limits=limits)
        first = {"type": "http.request", "body": b"\xff\xd8", "more_body": True}
        sent = asyncio.run(_call(app, dict(scope), [first]))
        assert sent[0]["status"] == status
        assert "error" in json.loads(sent[1]["body"])
