"""The report in a real browser: no label overlaps another or leaves its figure, and the console is empty."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from verl.report.page import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
)
MEASURE = Path(__file__).with_name("measure.js").read_text()

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium; `make browser` installs it on Debian")


def opened(page: Path, tmp_path: Path, *flags: str, width: int = 1280) -> tuple[str, list[str]]:
    """Open a page; return the document after loading, and the lines of the console."""
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1000", *flags,
         "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def measured(page: Path, tmp_path: Path, *flags: str, width: int = 1280) -> dict:
    """Result of `measure.js` for a page; the page's policy against scripts is removed for it."""
    text = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text(), count=1)
    copy = page.with_name("measured.html")
    copy.write_text(text.replace("</body>", f"<script>{MEASURE}</script></body>"))
    dom, console = opened(copy, tmp_path, *flags, width=width)
    assert console == []
    (result,) = re.findall(r'<pre id="measured">(.*?)</pre>', dom, re.DOTALL)
    return json.loads(html.unescape(result))


def check(found: dict, labels: int) -> None:
    assert found["overlaps"] == []
    assert found["outside"] == []
    assert found["too_wide"] == 0
    assert not found["owned"]
    assert found["labels"] > labels


@pytest.fixture(scope="module")
def report(tmp_path_factory, write_run):
    directory = write_run(tmp_path_factory.mktemp("runs") / "a run of everyday")
    return write_report([directory], directory / "report.html")


@pytest.mark.parametrize("width", [1280, 480])
def test_labels_of_one_run_do_not_overlap(report, tmp_path, width):
    check(measured(report, tmp_path, width=width), labels=300)


def test_labels_of_runs_with_long_names_and_long_text_do_not_overlap(make_run, tmp_path):
    def samples(step):
        script = "<script>window.owned = true; throw new Error()</script><img src=x onerror='window.owned = true'>"
        long = "a rather long answer " * 300 + "x" * 3000
        return [{"input": script, "output": script + long, "gts": script, "score": 1e-9, "step": step, script: script}]

    names = ["one-run-with-a-name-that-goes-on-and-on-and-on", "_$second$<b>", *"cdefg"]
    runs = [make_run(f"all/{name}", level=1000.0 * place, samples=samples) for place, name in enumerate(names)]
    check(measured(write_report(runs, tmp_path / "report.html"), tmp_path), labels=800)


@pytest.mark.parametrize(("settings", "dark"), [((), False), (("--blink-settings=preferredColorScheme=0",), True)])
def test_text_has_contrast_in_light_and_dark_mode(report, tmp_path, settings, dark):
    found = measured(report, tmp_path, *settings)
    page, ink = (sum(map(int, re.findall(r"\d+", found[name])[:3])) / 3 for name in ("background", "ink"))
    assert (page < 64) == dark
    assert abs(page - ink) > 100


def test_the_page_writes_nothing_to_the_console(report, tmp_path):
    dom, console = opened(report, tmp_path)
    assert console == []
    assert "Reward in training" in dom


def test_the_measurement_detects_faults(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        "<body><p style='position: absolute; top: 9px'>below</p><p style='position: absolute; top: 12px'>above</p>"
        "<svg width=90 height=90><text x=80 y=50>cut off</text></svg><div style='width: 3000px'>wide</div></body>"
    )
    found = measured(page, tmp_path)
    assert found["overlaps"] == [["below", "above"]]
    assert found["outside"] == ["cut off"]
    assert found["too_wide"] > 1000
    page.write_text("<body><script>throw new Error('seen')</script></body>")
    assert "seen" in opened(page, tmp_path)[1][0]
