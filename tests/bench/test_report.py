"""Tables and the HTML report: complete, escaped, and needing nothing from outside."""

from __future__ import annotations

import html.parser
import io
import re
import shutil
import subprocess

import msgspec
import pytest
from rich.console import Console

from ganexport.bench import svg
from ganexport.bench.compare import merge_reports
from ganexport.bench.cost import with_price
from ganexport.bench.digest import digest, speedup_words
from ganexport.bench.html import to_html
from ganexport.bench.table import print_report, to_markdown
from ganexport.errors import UsageError
from ganexport.measurement import Measurement, Report, Series
from ganexport.stats import Interval

EVIL = "<script>alert('x')</script>"


def measured(name, milliseconds, batch=1, parity=None, **facts):
    step = int(milliseconds * 1e4)
    samples = tuple(int(milliseconds * 1e6) + step * (i % 7) for i in range(160))
    conditions = {
        "scenario": "single-stream" if batch == 1 else "offline",
        "sizes": {"batch": batch},
        "items": batch,
        "warm_up": {"steady": name != "shaky", "seconds": 3.0},
    }
    facts = {"round_sizes": {"end_to_end": [40] * 4, "compute": [40] * 4}, "peak_host_bytes": 100 << 20, **facts}
    series = (Series("end_to_end", samples, batch), Series("compute", samples, batch))
    return Measurement({"name": name, "device": "cpu"}, conditions, series, parity=parity, facts=facts)


def full_report():
    roof = {"intensity": 20.0, "achieved": 150e9, "roof": 200e9, "share": 0.75, "bound": "compute"}
    trials = [
        {"rate": r, "p99_ns": 1e6 * r, "p50_ns": 1e6, "kept": r < 30, "answered": 300, "planned": 300, "mean_batch": 2}
        for r in (10, 20, 40)
    ]
    rows = (
        measured("eager", 4.0, parity={"verdict": "reference"}, roofline=roof),
        measured("onnxruntime", 2.0, parity={"verdict": "pass", "psnr": 120.0}),
        measured("shaky", 3.0, parity={"verdict": "pass", "psnr": None}, leaked_bytes_per_run=4096.0),
        measured(EVIL, 0.1, parity={"verdict": "fail", "psnr": 12.0, "failures": ["image"]}),
        measured("onnxruntime", 20.0, batch=16),
        Measurement({"name": "trt"}, {"scenario": "single-stream", "sizes": {"batch": 1}}, unavailable="no GPU & none"),
        Measurement(
            {"name": "onnxruntime"},
            {"scenario": "server", "sizes": {}, "slo_ms": 50.0},
            (Series("latency", tuple(range(10**6, 3 * 10**6, 10**4))),),
            facts={"rate": 20.0, "trials": trials},
        ),
        Measurement(
            {"name": "onnxruntime"},
            {"scenario": "cold-start", "sizes": {"batch": 1}},
            (
                Series("cold_start", (300_000_000, 310_000_000, 450_000_000)),
                Series("load", (70_000_000, 80_000_000, 90_000_000)),
                Series("first_run", (2_000_000, 3_000_000, 40_000_000)),
            ),
        ),
    )
    environment = {
        "cpu": {"model": "EPYC", "affinity": 2},
        "gpus": [],
        "libraries": {"onnxruntime": "1.31"},
        "peaks": {"cpu": {"gemm": {"fp32": 200e9}, "copy": 20e9}},
    }
    return Report(1, "digits", environment, rows, ("noisy: beware",), "ganexport bench digits")


class Balanced(html.parser.HTMLParser):
    VOID = ("meta", "br")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_safe_and_self_contained():
    page = to_html(full_report())
    parser = Balanced()
    parser.feed(page)
    assert not parser.open
    assert not {"script", "link", "img", "iframe"} & set(parser.tags)
    assert not [name for name, _ in parser.attributes if name in ("src", "href") or name.startswith("on")]
    assert not re.search(r"https?://|url\(|@import", page)
    assert EVIL not in page
    assert "prefers-color-scheme:dark" in page
    assert parser.tags.count("figure") == 4


def test_the_page_says_what_a_sceptic_asks():
    page = to_html(full_report())
    for text in ("no GPU &amp; none", "WRONG (12 dB)", "noisy: beware", "not steady after 3.0 s", "leaks 4 KiB a run"):
        assert text in page
    for text in ("75% compute", "onnxruntime 1.31", "fp32 200 GFLOP/s", "ganexport bench digits", "bootstrap"):
        assert text in page


def test_terminal_and_markdown_hold_every_row():
    report = full_report()
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=200, color_system=None))
    for text in (stream.getvalue(), to_markdown(report)):
        for name in ("eager", "onnxruntime", "not run: trt: no GPU & none", "2.00x", "server", "cold-start", "noisy"):
            assert name in text
    rows = [line for line in to_markdown(report).splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)


def test_a_cold_start_shows_its_parts_and_the_slowest_start():
    line = next(line for line in digest(full_report().measurements) if line.scenario == "cold-start")
    assert (line.median.value, line.slowest, line.load, line.first_run) == (310, 450, 80, 3)
    row = next(
        row for row in to_markdown(full_report()).splitlines() if row.startswith("| onnxruntime") and " 310 " in row
    )
    assert row.split(" | ")[2:5] == ["450", "80.0", "3.00"]


@pytest.mark.parametrize("width", [70, 80, 100, 120, 200])
def test_a_narrow_terminal_leaves_columns_out_and_cuts_no_number(width):
    report = full_report()
    stream = io.StringIO()
    rows = [r for r in report.measurements if r.candidate["name"] != EVIL]
    print_report(msgspec.structs.replace(report, measurements=tuple(rows)), Console(file=stream, width=width))
    text = stream.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for name in ("median ms", "images/s", "speedup", "parity", "2.00x"):
        assert name in text
    assert ("compute ms" in text.partition("note:")[0]) == (width >= 120)
    assert ("columns that did not fit" in text) == (width < 120)


def test_copies_energy_and_disturbances_are_shown_where_there_are_any():
    row = measured(
        "trt", 2.0, joules_per_1000=3.5, cpu={"others_cores": 1.3, "stolen_cores": 0.2, "quota_stopped": 0.1}
    )
    copies = (Series("host_to_device", (10**5,) * 160), Series("device_to_host", (2 * 10**5,) * 160))
    row = msgspec.structs.replace(row, series=(*row.series, *copies))
    for text in (to_markdown(Report(1, "t", {}, (row,))), to_html(Report(1, "t", {}, (row,)))):
        for word in (
            "to device",
            "0.100",
            "to host",
            "0.200",
            "J/1000 images",
            "3.5",
            "other processes used 1.3 cores",
        ):
            assert word in text
        assert "withheld 0.20 cores" in text
        assert "energy: not available" not in text
    plain = to_markdown(full_report())
    assert "energy: not available" in plain
    assert "J/1000" not in plain
    assert "to device" not in plain


def test_a_merged_report_has_every_machines_roof_and_says_what_holds_for_several_once():
    report = full_report()
    other = msgspec.structs.replace(report, environment={**report.environment, "cpu": {"model": "Other"}})
    page = to_html(merge_reports([report, other]))
    assert page.count("roof: ") == 2
    rows = tuple(measured(name, 2.0, cpu={"others_cores": 1.3}) for name in ("a", "b"))
    assert "a, b: other processes used 1.3 cores meanwhile" in to_markdown(Report(1, "t", {}, rows))


def test_the_best_batch_is_found():
    report = Report(1, "t", {}, (measured("a", 1.0), measured("a", 4.0, batch=16), measured("a", 40.0, batch=64)))
    assert "| a | 16 |" in to_markdown(report)


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        ((1.0, 0.98, 1.02), "1.00x [0.98, 1.02] equal"),
        ((1.0, 0.8, 1.2), "1.00x [0.80, 1.20] undecided"),
        ((2.0, 1.9, 2.1), "2.00x [1.90, 2.10]"),
        ((0.004, 0.003, 0.005), "0.004x [0.003, 0.005]"),
    ],
)
def test_a_speedup_says_whether_it_is_one(ratio, words):
    assert speedup_words(Interval(*ratio)) == words


def test_an_empty_report_is_no_crash():
    empty = Report(1, "none", {"cpu": {}}, ())
    assert "none" in to_html(empty)
    assert to_markdown(empty).startswith("### none")


def test_images_a_dollar_follow_from_the_throughput():
    report = with_price(full_report(), 2.0)
    assert report.measurements[4].facts["items_per_dollar"] == pytest.approx(16 / 0.0206 * 3600 / 2, rel=0.02)
    assert "images a dollar at $2 an hour" in to_markdown(report)
    with pytest.raises(UsageError, match="positive"):
        with_price(full_report(), 0)


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [(0, 1, False), (3, 17, False), (0.001, 900, True), (1, 64, True), (5, 5, True), (2, 2, False)],
)
def test_axes_hold_their_values(low, high, log):
    axis = svg.Axis([low, high], log=log)
    assert axis.low <= low <= high <= axis.high
    assert 2 <= len(axis.ticks) <= 12
    assert axis.ticks == sorted(axis.ticks)
    assert 0 <= axis.at(low, 0, 100) <= axis.at(high, 0, 100) <= 100


def test_points_that_an_axis_cannot_show_are_left_out():
    assert svg.chart("t", [svg.Curve("a", [(0, 1), (float("nan"), 1)])], x_label="x", y_label="y", log_x=True) == ""


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_chromium_draws_it(tmp_path, dark):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    page.write_text(to_html(full_report()), encoding="utf-8")
    arguments = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,1400"]
    arguments += ["--blink-settings=preferredColorScheme=0"] if dark else []
    subprocess.run([*arguments, f"--screenshot={picture}", str(page)], capture_output=True, timeout=120, check=True)
    from PIL import Image

    pixels = Image.open(picture).convert("L")
    assert (pixels.getpixel((2, 2)) < 60) == dark
    assert len(set(pixels.resize((100, 140)).tobytes())) > 20
