"""The page in a real browser: what a person sees, with the mouse's and the keyboard's means.

Slow, as Chromium cannot be assumed; without it, asked for with -m slow, the test fails.
"""

from __future__ import annotations

import base64
import io
import time
from pathlib import Path

import numpy as np
import pytest
from browser import Browser
from PIL import Image

import ganexport

pytestmark = pytest.mark.slow

# Decoding is refused when the page puts another picture in its place meanwhile: then that one is decoded.
PIXELS = """(async () => { const image = document.getElementById("picture");
for (let left = 100; ; left--) {
  try { await image.decode(); break; } catch (error) { if (!left) throw error; }
  await new Promise((resolve) => setTimeout(resolve, 20));
}
const canvas = document.createElement("canvas");
canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
canvas.getContext("2d").drawImage(image, 0, 0); return canvas.toDataURL("image/png").split(",")[1]; })()"""


def shown(browser: Browser, script: str = PIXELS) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(browser.run(script)))).convert("RGB"))


def drawn(browser: Browser, caption: str) -> None:
    browser.wait(f'document.getElementById("status").textContent.startsWith("Done") && '
                 f'document.getElementById("caption").textContent === "{caption}"')  # fmt: skip


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_seed_class_truncation_and_walk(local, artifact: Path, tmp_path: Path, dark: bool) -> None:
    with ganexport.load(artifact) as generator:
        browser = Browser(tmp_path, f"http://127.0.0.1:{local.port}/", dark=dark)
        try:
            drawn(browser, "Seed 0")
            np.testing.assert_array_equal(shown(browser), generator.generate(1, 0)[0])

            # By keyboard alone: tab into the seed, replace it, enter.
            browser.run('document.getElementById("seed").select(), document.getElementById("seed").focus()')
            browser.type("18446744073709551615")
            browser.key("Enter", 13, "\r")
            drawn(browser, "Seed 18446744073709551615")
            np.testing.assert_array_equal(shown(browser), generator.generate(1, 2**64 - 1)[0])
            browser.key("Tab", 9)
            browser.key("Tab", 9)
            assert browser.run("document.activeElement.id") == "next"
            browser.key("Enter", 13, "\r")
            drawn(browser, "Seed 0")

            browser.run('(label.value = "3", label.dispatchEvent(new Event("change")))')
            browser.run("truncate.click()")
            browser.run('(truncation.value = "0.5", truncation.dispatchEvent(new Event("input")))')
            wanted = generator.generate(1, 0, labels=3, truncation=0.5)[0]
            for _ in range(100):
                if (shown(browser) == wanted).all():
                    break
                time.sleep(0.05)
            np.testing.assert_array_equal(shown(browser), wanted)
            browser.wait('document.getElementById("truncation-value").textContent === "0.50"')

            browser.run('(document.getElementById("to").value = "5", document.querySelector("#make-walk").click())')
            browser.wait('document.getElementById("walk-status").textContent === "24 steps."')
            browser.run("step.focus()")
            for _ in range(23):
                browser.key("ArrowRight", 39)
            browser.wait('document.getElementById("step-value").textContent === "24 of 24"')
            frame = shown(browser, 'document.getElementById("frame").toDataURL("image/png").split(",")[1]')
            np.testing.assert_array_equal(frame, generator.generate(1, 5, labels=3, truncation=0.5)[0])
            browser.screenshot(tmp_path / "page.png")

            browser.run('(seed.value = "-3", seed.dispatchEvent(new Event("input")))')
            browser.wait('document.getElementById("status").textContent.startsWith("A seed is")')
            ground = browser.run("getComputedStyle(document.body).backgroundColor")
            assert (ground == "rgb(21, 22, 24)") == dark
            assert not browser.exceptions
        finally:
            browser.close()
