"""Parameters that a real vLLM engine keeps in another dtype than its own."""

import pytest
import torch

from fixtures.engine import weights_of
from verl.workers.weight_sync.manifest import WeightUpdateError

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("kind", ["glm4_moe", "deepseek_v3"])
def test_parameters_that_the_engine_keeps_in_float32_are_not_rounded(tiny_models, engines, kind):
    first, second = tiny_models(2, kind=kind, tied=False)
    running, _ = engines.get(first, dtype="bfloat16")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    for source in (second, first):
        weights = weights_of(source)
        running.update(weights.items(), dtype=torch.bfloat16)
        held = running.model.get_parameter(name)
        assert held.dtype == torch.float32 and torch.equal(held, weights[name])
    assert name in running.dtypes
    del weights[name]
    with pytest.raises(
        WeightUpdateError, match=r"not written, the first is 'model\.layers\.1\..*e_score_correction_bias'"
    ):
        running.update(weights.items(), dtype=torch.bfloat16)
