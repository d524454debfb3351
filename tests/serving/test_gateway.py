"""The API on a real socket, with one engine in this process."""

from __future__ import annotations

import io
import json
import threading
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving_helpers import SIZE, make_artifact

import ganexport
from ganexport.errors import UsageError
from ganexport.serving.drawing import Abilities, Job, check
from ganexport.spec import Dim


def picture(body: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(body)))


@pytest.fixture(scope="module")
def expected(artifact: Path):
    with ganexport.load(artifact) as generator:
        yield generator


def test_png_is_the_picture_that_python_makes(local, expected) -> None:
    reply = local.client.generate(seed=7, labels=3)
    assert (reply.status, reply.headers["content-type"]) == (200, "image/png")
    np.testing.assert_array_equal(picture(reply.body), expected.generate(1, 7, labels=3)[0])


def test_count_and_start_are_samples_of_one_seed(local, expected) -> None:
    reply = local.client.generate(seed=9, start=100, count=5, format="npy", truncation=0.5)
    np.testing.assert_array_equal(reply.array, expected.generate(5, 9, start=100, truncation=0.5))


def test_seeds_larger_than_a_batch_and_labels_one_a_sample(local, expected) -> None:
    seeds = [*range(19), 2**64 - 1]
    labels = [k % 5 for k in range(20)]
    reply = local.client.generate(seeds=seeds, labels=labels, format="npy")
    np.testing.assert_array_equal(reply.array, expected.generate(seeds=seeds, labels=labels))


def test_zip_holds_a_png_a_sample_and_the_same_bytes_each_time(local, expected) -> None:
    first, second = (local.client.generate(seeds=[4, 5], format="zip") for _ in range(2))
    assert first.body == second.body
    with zipfile.ZipFile(io.BytesIO(first.body)) as archive:
        assert archive.namelist() == ["000000.png", "000001.png"]
        np.testing.assert_array_equal(picture(archive.read("000001.png")), expected.generate(seeds=[4, 5])[1])


def test_grid_and_webp(local, expected) -> None:
    images = expected.generate(3, 1)
    sheet = picture(local.client.generate(seed=1, count=3).body)
    assert sheet.shape == (2 * SIZE, 2 * SIZE, 3)
    np.testing.assert_array_equal(sheet[:SIZE, SIZE:], images[1])
    np.testing.assert_array_equal(sheet[SIZE:, SIZE:], 0)
    webp = local.client.generate(seed=1, count=3, format="webp")
    assert webp.headers["content-type"] == "image/webp"
    assert picture(webp.body).shape == sheet.shape


def test_walk_begins_and_ends_at_its_seeds(local, expected) -> None:
    body = {"from_seed": 1, "to_seed": 2, "steps": 5, "label": 2, "format": "npy"}
    walk = local.client.request("/v1/walk", body).array
    np.testing.assert_array_equal(walk[[0, -1]], expected.generate(seeds=[1, 2], labels=2))
    steps = np.abs(np.diff(walk.astype(int), axis=0)).mean(axis=(1, 2, 3))
    assert (steps > 0).all()
    strip = picture(local.client.request("/v1/walk", {**body, "format": "png"}).body)
    assert strip.shape == (SIZE, 5 * SIZE, 3)


def test_image_by_address_is_cacheable(local, expected) -> None:
    reply = local.client.request("/v1/images/5?label=1&truncation=0.7")
    np.testing.assert_array_equal(picture(reply.body), expected.generate(1, 5, labels=1, truncation=0.7)[0])
    again = local.client.request(
        "/v1/images/5?label=1&truncation=0.7", headers={"If-None-Match": reply.headers["etag"]}
    )
    assert again.status == 304
    other = local.client.request(
        "/v1/images/6?label=1&truncation=0.7", headers={"If-None-Match": reply.headers["etag"]}
    )
    assert other.status == 200


def test_requests_at_once_share_batches_and_get_their_own_samples(local, expected) -> None:
    replies: dict[int, np.ndarray] = {}

    def ask(seed: int) -> None:
        replies[seed] = local.client.generate(seed=seed, count=3, format="npy").array

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(12)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for seed, images in replies.items():
        np.testing.assert_array_equal(images, expected.generate(3, seed))
    text = local.client.request("/metrics").body.decode()
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("ganexport_batch_rows"))
    # Some batch carried more than the three samples of one request.
    assert float(lines["ganexport_batch_rows_count"]) > float(lines['ganexport_batch_rows_bucket{le="4.0"}'])


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"seed": True}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"seed": 1, "count": 0}, "count"),
        ({"seed": 1, "count": 33}, "33 samples are more"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1], "count": 2}, "count"),
        ({"seed": 1, "labels": 5}, "0 to 4"),
        ({"seed": 1, "labels": [1, 2]}, "2 labels for 1"),
        ({"seed": 1, "truncation": 0}, "truncation"),
        ({"seed": 1, "truncation": 9.0}, "truncation"),
        ({"seed": 1, "format": "gif"}, "format"),
        ({"seed": 1, "path": "/etc/passwd"}, "path"),
        ([1, 2], "Input should be"),
        (b'{"seed": NaN}', "seed"),
        (b'{"seed": 1, "truncation": Infinity}', "truncation"),
        (b'{"seed": 1, "truncation": 1e999}', "truncation"),
        (b'{"seed": 1, "\\ud800": 1}', "unicode"),
        (b"", "required"),
    ],
)
def test_a_wrong_request_is_422_with_one_line_that_names_the_field(local, body, says) -> None:
    reply = local.client.request("/v1/generate", body)
    assert reply.status == 422, reply.body
    assert says in reply.json["detail"]
    assert "\n" not in reply.json["detail"]


def test_openapi_is_narrowed_to_the_generator(local) -> None:
    schemas = local.client.request("/openapi.json").json["components"]["schemas"]
    assert schemas["BySeed"]["properties"]["count"]["maximum"] == 32
    label = next(s for s in schemas["Walk"]["properties"]["label"]["anyOf"] if s["type"] == "integer")
    assert label["maximum"] == 4


def test_every_answer_has_an_id_and_a_log_line(local) -> None:
    reply = local.client.request("/v1/images/1", headers={"X-Request-ID": "abc-1"})
    assert reply.headers["x-request-id"] == "abc-1"
    forged = local.client.request("/v1/images/1", headers={"X-Request-ID": 'a"} {"event'})
    assert forged.headers["x-request-id"] != 'a"} {"event'
    lines = [json.loads(line) for line in local.log.getvalue().splitlines()]
    line = next(line for line in lines if line.get("id") == "abc-1")
    assert (line["event"], line["status"], line["samples"]) == ("request", 200, 1)


def test_the_page_is_self_contained(local) -> None:
    reply = local.client.request("/")
    assert reply.headers["content-type"].startswith("text/html")
    assert b"http://" not in reply.body
    assert b"https://" not in reply.body
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_model_says_what_can_be_asked_for(local) -> None:
    model = local.client.request("/v1/model").json
    assert model["abilities"] == {
        "classes": 5, "truncation": [0.01, 8.0], "formats": ["png", "webp", "npy", "zip"], "shape": [SIZE, SIZE, 3],
    }  # fmt: skip


def test_generators_of_arrays_fixed_batches_and_no_classes(make_local, tmp_path: Path) -> None:
    path = make_artifact(tmp_path / "audio", labels=False, pictures=False, dim=Dim("batch", 4, 4, 8, 4)).path
    client = make_local(path).client
    reply = client.generate(seed=3, count=6, format="npy")
    with ganexport.load(path) as generator:
        np.testing.assert_array_equal(reply.array, generator.sample(6, 3)["audio"])
    assert client.generate(seed=3, format="png").status == 422
    assert client.generate(seed=3, labels=1).status == 422
    with zipfile.ZipFile(io.BytesIO(client.generate(seed=3, format="zip").body)) as archive:
        assert archive.namelist() == ["audio.npy"]


def test_an_unreachable_path_is_404_and_says_nothing_of_files(local) -> None:
    for path in ("/../../etc/passwd", "/v1/images/..%2f..%2fetc%2fpasswd", "/static/x", "/v1/generate/../../x"):
        assert local.client.request(path).status in (404, 405, 422)


def test_what_is_not_json_is_named_as_that(local) -> None:
    reply = local.client.request("/v1/generate", b'{"seed": 1,}')
    assert (reply.status, reply.json["detail"].split(":")[0]) == (400, "not JSON")
    form = {"content-type": "application/x-www-form-urlencoded"}  # what curl -d sends
    reply = local.client.request("/v1/generate", b'{"seed": 1}', form)
    assert (reply.status, reply.json["detail"]) == (415, "send JSON with the header content-type: application/json")
    for kind in ("application/json; charset=utf-8", "application/problem+json", "Application/JSON"):
        assert local.client.request("/v1/generate", b'{"seed": 1}', {"content-type": kind}).status == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/"])
def test_probes_may_ask_for_the_head_alone(local, path: str) -> None:
    request = urllib.request.Request(local.client.url + path, method="HEAD")
    with urllib.request.urlopen(request, timeout=10) as response:
        assert (response.status, response.read()) == (200, b"")


def test_a_webp_that_would_be_too_large_is_refused_before_it_is_generated() -> None:
    able = Abilities(None, None, ("png", "webp"), (1024, 1024, 3))
    check(Job(225, format="webp"), able)  # 15 x 15
    check(Job(17, walk_to=1), able)
    for job in (Job(226, format="webp"), Job(16, walk_to=1, format="webp")):  # 16 x 16; one row of 16
        with pytest.raises(UsageError, match="at most 16383 pixels a side"):
            check(job, able)
