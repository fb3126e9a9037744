"""The policy loss that docs/extending.md adds to verl, from the diff in the document."""

import pytest

from fixtures.doc_diffs import apply_documented_diff, run_in

CODE = """
import math

import torch

import verl
from verl.config import load_config
from verl.trainer.ppo.core_algos import get_policy_loss_fn

assert verl.__file__.startswith(FOLDER)
actor = load_config(["actor_rollout_ref.actor.policy_loss.loss_mode=topr"]).actor_rollout_ref.actor
old = torch.tensor([[-1.0, -1.0, -1.0, -1.0, -1.0]])
new = torch.tensor([[-0.5, -0.5, -2.0, -2.0, -9.0]], requires_grad=True)
advantages = torch.tensor([[2.0, -2.0, 2.0, -2.0, 7.0]])
mask = torch.tensor([[1, 1, 1, 1, 0]])
loss, metrics = get_policy_loss_fn(actor.policy_loss.loss_mode)(
    old_log_prob=old, log_prob=new, advantages=advantages, response_mask=mask, loss_agg_mode="token-sum", config=actor
)
weights = [1.0, 1.0, 1.0, math.exp(-1.0), 0.0]
gradient = -torch.tensor([weights]) * advantages
loss.backward()
torch.testing.assert_close(new.grad, gradient)
torch.testing.assert_close(loss, (gradient * new).sum())
assert metrics["actor/pg_clipfrac"] == 0.25
"""


@pytest.mark.slow
def test_documented_loss_is_computed_through_the_registry(tmp_path):
    folder = tmp_path / "verl_with_loss"
    assert apply_documented_diff("A policy loss inside verl", folder) == [
        "verl/algorithms/losses/topr.py",
        "verl/config/names.py",
        "docs/algorithms.md",
    ]
    run_in(folder, f"FOLDER = {str(folder)!r}\n{CODE}")
    rows = [line for line in (folder / "docs/algorithms.md").read_text().splitlines() if line.startswith("| `topr` |")]
    assert len(rows) == 1
