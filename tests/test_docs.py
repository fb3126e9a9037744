"""The documentation: it builds as a site, its keys exist, and what is written from the source is as written."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

from fixtures.tiny import write_tiny_model
from verl.trainer.config import check, load_config

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


PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("examples/*/README.md"))]
OVERRIDE = re.compile(r"~?\+{0,2}(data|actor_rollout_ref|critic|algorithm|reward|trainer|ray_kwargs)\.[\w.]+=")


def blocks(page, *languages):
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def overrides(page):
    """Every `key=value` of a config in the page's shell blocks."""
    for block in blocks(page, "", "bash", "sh"):
        for line in block.splitlines():
            # What is no shell, such as output, has quotes that do not end.
            open_ended = line.count("'") % 2 or line.count('"') % 2
            words = line.split() if open_ended else shlex.split(line.removesuffix("\\"), comments=True)
            yield from (word for word in words if OVERRIDE.match(word))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_keys_in_the_pages_exist_and_take_their_values(page):
    for override in overrides(page):
        load_config([re.sub(r"\$\{?\w+\}?", "1", override)])
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")


def test_there_are_keys_in_the_pages():
    assert sum(len(list(overrides(page))) for page in PAGES) > 40


def test_the_readme_s_own_data_and_reward(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, reward = blocks(ROOT / "README.md", "python")[:2]
    exec(compile(data, "make_data.py", "exec"), {})
    namespace = {}
    exec(compile(reward, "my_reward.py", "exec"), namespace)
    rows = pyarrow.parquet.read_table("train.parquet").to_pylist()
    truth = rows[12]["reward_model"]["ground_truth"]
    assert len(rows) == 90 and namespace["compute_score"]("my_task", f"it is {truth}", truth, {}) == 1
    (tmp_path / "my_reward.py").write_text(reward)
    model = write_tiny_model(tmp_path / "model")
    command = next(block for block in blocks(ROOT / "README.md", "bash") if "main_ppo" in block)
    words = shlex.split(command.replace("\\\n", " ").replace("/path/to/a/hugging/face/model", str(model)))
    plan = check(load_config(words[words.index("verl.trainer.main_ppo") + 1 :]))
    assert "90 to train on, 10 to validate on" in plan.render()
