"""The documentation as a site: every page is in its navigation, every link leads somewhere."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def build(root, target):
    config = ["--config-file", str(root / "mkdocs.yml"), "--site-dir", str(target)]
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", *config],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )


def test_the_errors_are_those_of_the_source():
    namespace = runpy.run_path(str(ROOT / "scripts/write_errors.py"))
    assert (ROOT / "docs/errors.md").read_text() == namespace["page"](), "run `make reference`"
    source = """
if x:
    raise ValueError(f"field={value}: give " + more)
found.errors.append("a is b" if c else f"b is {d}")
raise KeyError(name)
"""
    expected = ["field={value}: give {more}", "a is b", "b is {d}"]
    assert sorted(namespace["messages"](source)) == sorted(expected)


def test_the_site_builds_without_a_warning(tmp_path):
    built = build(ROOT, tmp_path / "site")
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert pages <= {page.stem for page in (tmp_path / "site").glob("*.html")}


def test_a_broken_link_and_a_page_that_nobody_finds_are_errors(tmp_path):
    (tmp_path / "mkdocs.yml").write_text((ROOT / "mkdocs.yml").read_text().split("nav:\n")[0] + "nav:\n  - index.md\n")
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("[nowhere](nowhere.md)\n")
    assert "nowhere.md" in build(tmp_path, tmp_path / "site").stderr
    (docs / "index.md").write_text("# Home\n")
    (docs / "lost.md").write_text("# Lost\n")
    built = build(tmp_path, tmp_path / "site")
    assert built.returncode == 1 and "lost.md" in built.stderr
