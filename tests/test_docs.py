"""The documentation: it builds as a site, its keys exist, and its code blocks run."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
import torch

from fixtures.tiny import write_tiny_model
from fixtures.training import TinyRun
from verl.config import load_config
from verl.extension.user_files import import_file
from verl.preflight import check
from verl.utils.dataset.rl_dataset import create_rl_dataset
from verl.utils.tokenizer import hf_tokenizer
from verl.workers.reward.function import load_function

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
FAST = ("README", "index", "ascend", "quickstart")  # the other pages are slow tests
OVERRIDE = re.compile(r"~?\+{0,2}(data|actor_rollout_ref|critic|algorithm|reward|trainer|ray_kwargs)\.[\w.]+=")


def blocks(page, *languages):
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def overrides(page):
    """Yield every config override `key=value` in the shell blocks of a page."""
    for block in blocks(page, "", "bash", "sh"):
        for line in block.splitlines():
            # Output is not shell syntax and may contain unbalanced quotes.
            open_ended = line.count("'") % 2 or line.count('"') % 2
            words = line.split() if open_ended else shlex.split(line.removesuffix("\\"), comments=True)
            yield from (word for word in words if OVERRIDE.match(word))


@pytest.mark.parametrize(
    "page",
    [page if page.stem in FAST else pytest.param(page, marks=pytest.mark.slow) for page in PAGES],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_keys_in_the_pages_exist_and_take_their_values(page):
    """Does not raise."""
    for override in overrides(page):
        load_config([re.sub(r"\$\{?\w+\}?", "1", override)])
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")


def test_the_pages_contain_many_keys():
    assert sum(len(list(overrides(page))) for page in PAGES) > 40


def test_the_figures_of_the_readme_are_those_of_the_performance_page():
    readme, page = (ROOT / "README.md").read_text(), (ROOT / "docs/performance.md").read_text()

    def row(start):
        return next(line for line in page.splitlines() if line.startswith(start))

    assert "0.262 -> 0.963" in readme and "0.262 -> 0.963" in row("| mean reward on held-out words")
    assert "0.47%" in readme and "0.47%" in row("| 135M  | delta, lr 1e-06")
    assert "1.45 times" in readme and "**1.45**" in row("| 135M  | equal   | 32 x 32 ")
    assert "4.2%" in readme and "**4.2%**" in row("| 135M  | equal   | 32 samples, 1024 tokens")


def test_data_and_reward_of_the_readme_give_a_valid_run(tmp_path, monkeypatch):
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
    assert "90 for training, 10 for validation" in plan.render()


def write_files(page, folder):
    """Write every Python block of a page to the file that its first line names."""
    for block in blocks(page, "python"):
        name = re.match(r"# (\w+\.py)\n", block)
        assert name is not None, block
        (folder / name[1]).write_text(block)


def words_after(command, page):
    """Return the arguments of the first command of a page that begins with `command`."""
    text = next(block for block in blocks(page, "bash") if block.startswith(command)).replace("\\\n", " ")
    return shlex.split(text.removeprefix(command))


def test_own_data_is_converted_scored_and_planned(tmp_path, monkeypatch):
    page = ROOT / "docs/own_data.md"
    monkeypatch.chdir(tmp_path)
    write_files(page, tmp_path)
    for split, count in (("train", 64), ("test", 8)):
        rows = [json.dumps({"q": f"Who wrote play {i}?", "a": f"Author {i}"}) for i in range(count)]
        (tmp_path / f"trivia_{split}.jsonl").write_text("\n".join(rows))
    runpy.run_path("convert_trivia.py")
    score = load_function("trivia_reward.py", "compute_score", {"ignore_case": False}).call
    row = pyarrow.parquet.read_table("train.parquet").to_pylist()[3]
    sample = {
        "data_source": row["data_source"],
        "ground_truth": row["reward_model"]["ground_truth"],
        "extra_info": row["extra_info"],
    }
    assert score(solution_str="It was Author 3.", **sample)["acc"] == 1.0
    assert score(solution_str="it was author 3.", **sample) == {"score": -0.0016, "acc": 0.0, "characters": 16}
    words = words_after("verl check", page)
    model = write_tiny_model(tmp_path / "model")
    plan = check(load_config([word.replace("=MODEL", f"={model}") for word in words]))
    assert "64 for training, 8 for validation" in plan.render()


def test_extensions_work_as_they_stand(tmp_path, monkeypatch):
    page = ROOT / "docs/extending.md"
    write_files(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    algorithm = import_file(tmp_path / "my_algorithm.py")
    rewards = torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.0, 2.0], [0.0, 2.0]])
    mask = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 1]])
    advantages, _ = algorithm.best_of_group(rewards, mask, np.array(["a", "a", "b", "b"]))
    assert advantages.tolist() == [[0, 0], [1, 1], [1, 0], [1, 1]]
    config = SimpleNamespace(global_batch_info={})
    log_prob = torch.full((4, 2), -2.0)
    loss, _ = algorithm.plain_policy_gradient(log_prob, log_prob, advantages, mask, "token-mean", config)
    assert loss.item() == pytest.approx(2 * 5 / 7)

    rows = [{"question": f"{i}+1?", "choices": [str(i), str(i + 1)]} for i in range(4)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "quiz.parquet")
    keys = [line for block in blocks(page, "sh") for line in block.split()]
    config = load_config(TinyRun(tmp_path / "run").overrides(data__max_prompt_length=64) + keys)
    quiz = create_rl_dataset("quiz.parquet", hf_tokenizer(config.actor_rollout_ref.model.path), config.data)
    assert quiz[2]["raw_prompt"][0]["content"] == "2+1?\nA. 2\nB. 3\nAnswer with a letter."
