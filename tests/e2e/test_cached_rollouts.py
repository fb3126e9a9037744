"""`skip.rollout`: a second run trains on the samples of the first one, and in the same way."""

import pytest

from fixtures.training import TinyRun

pytestmark = pytest.mark.e2e

SAME = (
    *("actor/pg_loss", "actor/grad_norm", "actor/entropy", "critic/score/mean", "critic/advantages/max"),
    *("response_length/mean", "training/rollout_probs_diff_mean", "training/versions_behind/max"),
)


def test_a_run_on_cached_rollouts_trains_like_the_run_that_wrote_them(tmp_path, ray_address):
    run = TinyRun(tmp_path, ray_address)
    keys = {
        "skip__rollout__enable": True,
        "skip__rollout__steps": "[1,2]",
        "skip__rollout__dump_dir": tmp_path / "rollouts",
        "trainer__resume_mode": "disable",
        "trainer__logger": '["file"]',
    }
    assert run.run(**keys).count("the samples are generated and kept") == 2
    first = run.metrics()
    run.out = tmp_path / "again"
    assert run.run(**keys).count("trains on the cached samples of step") == 2
    second = run.metrics()
    assert sorted(first) == sorted(second) == [1, 2]
    # New samples would differ: requests have no seed.
    for step, name in ((step, name) for step in first for name in SAME):
        assert second[step][name] == pytest.approx(first[step][name], rel=1e-4, abs=1e-7), (step, name)
