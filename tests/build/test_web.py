"""The browser's folder: its files here; in a real browser, with onnxruntime-web from npm, under -m slow."""

from __future__ import annotations

import functools
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

import ganexport
from ganexport.build.options import BuildOptions
from ganexport.build.web import build
from ganexport.errors import ExportError
from ganexport.parity import psnr
from ganexport.seeding import latents
from ganexport.spec import Dim, GeneratorSpec, TensorSpec, parse_input

sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))

from serving_helpers import make_artifact

GOLDEN = json.loads((Path(__file__).parents[1] / "seeding_golden.json").read_text())


@pytest.fixture
def artifact(tmp_path: Path):
    return make_artifact(tmp_path / "tiny")


def test_the_folder_is_complete_and_says_what_it_needs(artifact, tmp_path: Path) -> None:
    built = build(artifact.path / "generator.onnx", artifact.spec, tmp_path, "fp32", BuildOptions())
    present = {str(p.relative_to(tmp_path)) for p in (tmp_path / "web").iterdir()}
    assert present == {built.path, *built.companions}
    assert (tmp_path / "web/generator.onnx").read_bytes() == (artifact.path / "generator.onnx").read_bytes()
    package = json.loads((tmp_path / "web/package.json").read_text())
    assert package["dependencies"] == {"onnxruntime-web": built.requires["onnxruntime-web"]}
    assert msgspec.json.decode((tmp_path / "web/spec.json").read_bytes(), type=GeneratorSpec) == artifact.spec


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"inputs": (parse_input("z=data[batch,8]"),)}, "no sampler"),
        ({"inputs": (parse_input("z=normal[batch,8]:float16"),)}, "float16"),
        ({"outputs": (TensorSpec("image", "float32", ("batch", 3, 8, 8), None, None, "NCHW"),)}, "range"),
        ({"outputs": (TensorSpec("audio", "float32", ("batch", 1, 8)),)}, "pictures"),
    ],
)
def test_what_the_page_cannot_show_is_refused(artifact, tmp_path: Path, change, says) -> None:
    spec = msgspec.structs.replace(artifact.spec, **change)
    with pytest.raises(ExportError, match=says):
        build(artifact.path / "generator.onnx", spec, tmp_path, "fp32", BuildOptions())
    assert not (tmp_path / "web").exists()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[object, Path]]:
    from browser import Browser

    folder = tmp_path_factory.mktemp("browser")
    artifact = make_artifact(folder / "tiny")
    build(artifact.path / "generator.onnx", artifact.spec, folder, "fp32", BuildOptions())
    subprocess.run(["npm", "install", "--ignore-scripts", "--silent"], cwd=folder / "web", check=True, timeout=300)
    handler = functools.partial(Quiet, directory=str(folder / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = Browser(folder, f"http://127.0.0.1:{server.server_port}/", width=700)
        try:
            yield browser, artifact.path
        finally:
            browser.screenshot(folder / "web.png")
            browser.close()
            server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3, 2**64 - 1])
@pytest.mark.parametrize(("label", "truncation"), [(None, None), (3, 0.5)])
def test_the_browser_shows_python_s_picture(page, seed: int, label: int | None, truncation: float | None) -> None:
    browser, path = page
    browser.wait("window.generator", 60)
    options = json.dumps({"label": label, "truncation": truncation})
    pixels = browser.run(f"generator.picture({seed}n, {options}).then((picture) => Array.from(picture.data))")
    with ganexport.load(path) as generator:
        expected = generator.generate(1, seed, labels=label, truncation=truncation)[0]
    shown = np.array(pixels, np.uint8).reshape(*expected.shape[:2], 4)[..., :3]
    error = float(((shown.astype(float) - expected) ** 2).mean())
    reached = psnr(error, 255.0)
    assert reached is None or reached >= 50.0


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in GOLDEN if "float16" not in str(c["inputs"])], ids=lambda c: c["title"])
def test_javascript_draws_the_golden_latents_bit_for_bit(page, case) -> None:
    browser, _ = page
    browser.wait("window.generator", 60)
    dims = tuple(Dim(*d) for d in case.get("dims", [["batch", 1, 8, 64]]))
    spec = GeneratorSpec(tuple(parse_input(text) for text in case["inputs"]), (), dims)
    given = case["arguments"]
    options = [f"seed: {given.get('seed', 0)}n", f"start: {given.get('start', 0)}n", f"count: {given.get('n', 1)}"]
    if "seeds" in given:
        options.append(f"seeds: [{', '.join(f'{s}n' for s in given['seeds'])}]")
    if "truncation" in given:
        options.append(f"truncation: {given['truncation']}")
    script = f"""import("./seeding.js").then(({{ latents }}) => Object.fromEntries(Object.entries(
        latents({msgspec.json.encode(spec).decode()}, {{ {", ".join(options)} }})).map(([name, {{ data }}]) =>
        [name, Array.from(new Uint8Array(data.buffer), (b) => b.toString(16).padStart(2, "0")).join("")])))"""
    drawn = browser.run(script)
    for name, array in latents(spec, **given).items():
        assert drawn[name] == array.tobytes().hex(), name
