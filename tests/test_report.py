"""The pages: well-formed, self-contained, readable in both schemes, and right in a real browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_benchmark import SMALL, Standin
from typer.testing import CliRunner

import taut
from taut import benchmark, machine
from taut.api import write_page
from taut.benchmark import run
from taut.checkpoint import BadInput
from taut.cli import app
from taut.machine import Figure, Machine
from taut.report import bench_page
from taut.report.page import DARK, LIGHT, READABLE
from taut.report.roofline import Point, roofline
from taut.whole_file import write_text

MODEL = Path(__file__).parent.parent / "taut/demo/model"
BROWSERS = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome", "chrome")
VOID = {"meta", "br", "img", "link", "input", "hr"}


@pytest.fixture(scope="module")
def inspected(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "inspect.html"
    result = CliRunner().invoke(app, ["inspect", str(MODEL), "--machine", "h200-sxm", "--html", str(path)])
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture(scope="module")
def benched(tmp_path_factory) -> Path:
    here = Machine("m", "cpu", dict.fromkeys(("float32", "bfloat16"), Figure(1e12)), {"memory": Figure(1e10)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "measured", lambda *_: here)
        patch.setattr(machine, "read_size", lambda *_: 2**22)
        load = lambda m: run._load(m, None, None, False, 14)[0]  # noqa: E731
        found = benchmark.bench(MODEL, compile=lambda m, **_: Standin(load(m)), **SMALL)
    path = tmp_path_factory.mktemp("pages") / "bench.html"
    write_text(path, bench_page(found))
    return path


@pytest.fixture(params=["inspected", "benched"])
def page(request) -> Path:
    return request.getfixturevalue(request.param)


class Reader(HTMLParser):
    """Checks that tags are balanced; keeps addresses, ids, headings and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.addresses, self.headings, self.text, self.images = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        given = dict(attrs)
        self.addresses += [given[key] for key in ("src", "href", "xlink:href", "srcset") if key in given]
        if tag == "svg":
            self.images.append(given)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_it_is_balanced_and_asks_for_nothing_from_outside(page):
    source = page.read_text()
    reader = Reader()
    reader.feed(source)
    reader.close()
    assert not reader.open
    assert not reader.addresses
    assert not re.search(r"https?://|url\(|@import|<script", source)
    assert source.startswith("<!doctype html>")
    assert '<html lang="en">' in source
    assert 'name="viewport"' in source
    assert reader.headings[0] == 1
    assert all(b <= a + 1 for a, b in zip(reader.headings, reader.headings[1:], strict=False))
    assert all(image["role"] == "img" and image["aria-label"] for image in reader.images)
    assert "nan" not in " ".join(reader.text).split()


def test_what_the_inspected_page_says(inspected):
    text = inspected.read_text()
    for word in ("fold_norm", "12 applied, 1 refused", "it is an output of the model", "attention", "NVIDIA H200 SXM"):
        assert word in text
    assert "model.layers.{0..5}" in text
    assert taut.__version__ in text


def test_what_the_bench_page_says(benched):
    text = benched.read_text()
    for word in ("the same model", "transformers", "slack", "speed-up", "best of 3 reads", "which torch runs"):
        assert word in text


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_text_is_readable(scheme):
    """WCAG 2.2 AA: a contrast of 4.5 for text."""
    for text, ground in READABLE:
        light, dark = sorted((luminance(scheme[text]), luminance(scheme[ground])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)


def test_names_are_escaped(tmp_path):
    found = taut.inspect(MODEL, machine="h200-sxm")
    found.model = "<script>alert(1)</script>"
    write_page(found, tmp_path / "page.html")
    assert "<script" not in (tmp_path / "page.html").read_text()


def test_a_page_that_cannot_be_written_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="No such file"):
        write_text(tmp_path / "nowhere" / "page.html", "")


def test_points_lie_under_the_roof_and_inside_the_drawing():
    drawn = roofline(1e12, 1e10, [Point("a", 0.5, 5e9, 0.5), Point("b", 1000, 9e11, 0.4), Point("c", 0, 0, 0.1)], "r")
    circles = re.findall(r'<circle class="op" cx="([\d.]+)" cy="([\d.]+)"', drawn)
    assert len(circles) == 2
    assert all(0 <= float(x) <= 720 and 0 <= float(y) <= 380 for x, y in circles)
    assert ">a</text>" in drawn
    assert "9e+11" not in drawn


@pytest.mark.parametrize("width", [390, 1200])
def test_in_a_real_browser(page, width, tmp_path):
    """Nothing is wider than the window: what is scrolls in its own box."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("PAGES NOT OPENED IN A BROWSER: put a Chromium on PATH")
    probe = tmp_path / "probe.html"
    script = """<script>addEventListener("load", () => { const inside = e => e.closest(".scroll");
    const wide = [...document.querySelectorAll("main *, header *")].filter(
      e => !inside(e) && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80));
    document.title = JSON.stringify({wide, scroll: document.documentElement.scrollWidth, window: innerWidth,
      drawn: [...document.querySelectorAll("svg")].every(e => e.getBoundingClientRect().height > 100),
      ink: getComputedStyle(document.body).color}) })</script>"""
    probe.write_text(page.read_text().replace("</body>", script + "</body>"))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={width},900",
        "--virtual-time-budget=2000",
    ]
    done = subprocess.run(
        [browser, *options, "--dump-dom", probe.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    seen = json.loads(title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert not seen["wide"]
    assert seen["scroll"] <= seen["window"]
    assert seen["drawn"]
    assert seen["ink"].startswith("rgb")
