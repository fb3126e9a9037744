"""TRL's side of the comparison, if its environment is installed."""

from pathlib import Path

import models
import pytest
import runs
from grpo_step import trl_process

BUILT = (runs.HERE.parent / ".cache/trl/.fits").exists()


@pytest.mark.skipif(not BUILT, reason="TRL is not installed: scripts/setup_trl.sh makes its environment")
def test_trl_generates_as_many_tokens_as_the_prompts_request(tmp_path: Path):
    load = runs.Load(prompts=4, n=2, shortest=3, longest=12, updates=2, micro_batch=2)
    process = trl_process(load, models.write_model("0.8M", tmp_path / "model"), tmp_path, keeps_memory=False)
    try:
        assert process.wait_for_arrival() == 0
        assert process.step()[1] == load.tokens == 2 * (3 + 6 + 9 + 12)
        assert process.step()[1] == load.tokens
    finally:
        process.close()
