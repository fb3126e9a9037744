"""Mismatch metrics of a batch whose `old_log_probs` are partly the rollout's."""

import torch

from verl.config.rollout_correction import Correction
from verl.protocol import DataProto
from verl.trainer.ppo.off_policy import correct_rollout


def batch_of(rows, **more):
    generator = torch.Generator().manual_seed(3)
    old, rollout = (-torch.rand(6, 4, generator=generator) for _ in range(2))
    mask = torch.ones(6, 4, dtype=torch.int64)
    mask[2, 2:] = 0
    columns = {"old_log_probs": old, "rollout_log_probs": rollout, "response_mask": mask}
    columns = {name: column[rows] for name, column in columns.items()}
    return DataProto.from_dict(tensors=columns | more)


def test_only_samples_that_the_trainer_computed_are_measured():
    computed = torch.tensor([True, False, True, False, False, True])
    batch = batch_of(slice(None), recomputed_samples=computed)
    # As if the rollout's values were taken.
    batch.batch["old_log_probs"] = torch.where(
        computed[:, None], batch.batch["old_log_probs"], batch.batch["rollout_log_probs"]
    )
    result, metrics = correct_rollout(batch, Correction())
    assert metrics == correct_rollout(batch_of(computed), Correction())[1]
    assert metrics["rollout_corr/k3_kl"] > 0
    assert torch.equal(result.batch["accepted_mask"], batch.batch["response_mask"]), "all tokens are trained on"
