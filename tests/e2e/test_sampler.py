"""A curriculum of the user, through the command line: it decides about the prompts, also after a resume."""

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fixtures.training import TinyRun, prompts_of

pytestmark = pytest.mark.e2e

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs/extending.md").read_text(encoding="utf-8")
ROWS, BATCH, SAMPLES, DECAY = 16, 8, 4, 0.25


def write_sampler(directory):
    """Write the sampler of docs/extending.md; return its file."""
    (code,) = re.findall(r"```python\n(# my_sampler\.py\n.*?)```", DOCUMENT, re.DOTALL)
    path = directory / "my_sampler.py"
    path.write_text(code)
    return path


def scores_of(directory, step):
    """Prompt and score of each sample of a step."""
    lines = (directory / f"{step}.jsonl").read_text().splitlines()
    return [(sample["input"], sample["score"]) for sample in map(json.loads, lines)]


def expected_prompts(words, steps, lag):
    """The prompts of the step after `steps`, given prompts and scores of these steps: those with the lowest scores."""
    scores = dict.fromkeys(words, -1.0)
    for samples in steps[: len(steps) - lag]:
        for prompt, score in samples:
            scores[prompt] += DECAY * (score - scores[prompt])
    lowest = sorted(words, key=scores.__getitem__)[:BATCH]
    return [prompt for prompt in lowest for _ in range(SAMPLES)]


@pytest.mark.parametrize("lag", [0, 1])
def test_a_curriculum_decides_about_each_step_and_continues_after_a_resume(tmp_path, ray_address, lag):
    run = TinyRun(tmp_path, ray_address)
    changes = {
        "data__sampler__class_path": write_sampler(tmp_path),
        "data__sampler__class_name": "LowestScore",
        "data__sampler__decay": DECAY,
        "data__shuffle": False,
        "data__train_max_samples": ROWS,
        "trainer__rollout_lag": lag,
        "trainer__total_training_steps": 4,
        "trainer__save_freq": 2,
    }
    run.run(**changes, trainer__rollout_data_dir=tmp_path / "whole")
    rows = pq.read_table(run.train).to_pylist()[:ROWS]
    words = [f"<s>{row['prompt'][0]['content']}=" for row in rows]
    steps = [scores_of(tmp_path / "whole", step) for step in (1, 2, 3, 4)]
    trained = prompts_of(tmp_path / "whole")
    for step in (1, 2, 3, 4):
        assert trained[step] == expected_prompts(words, steps[: step - 1], min(lag, step - 1)), step
    assert trained[4] != trained[2], "the scores change the order"

    run.run(
        **changes,
        trainer__rollout_data_dir=tmp_path / "resumed",
        trainer__resume_mode="resume_path",
        trainer__resume_from_path=run.out / "global_step_2",
    )
    resumed = prompts_of(tmp_path / "resumed")
    steps = steps[:2] + [scores_of(tmp_path / "resumed", step) for step in (3, 4)]
    assert sorted(resumed) == [3, 4] and resumed[3] == trained[3]
    assert resumed[4] == expected_prompts(words, steps[:3], lag)
