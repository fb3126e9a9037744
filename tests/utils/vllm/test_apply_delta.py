"""Copies in host memory that deltas of a reloaded layer need. tests/e2e/test_engine_delta.py applies deltas."""

import torch
from torch import nn

from verl.utils.vllm.apply_delta import DeltaApplier
from verl.utils.vllm.layout_map import LayoutMap


def test_a_rank_keeps_no_experts_of_other_ranks():
    """This rank read `experts.0`, which its engine packs. It saw `experts.1` pass by."""
    layer, reloaded = nn.Linear(2, 2), []
    layout = LayoutMap(opaque={"experts.0"}, names={"experts.0", "experts.1"})
    applier = DeltaApplier(
        nn.Sequential(layer),
        layout,
        reloaded={"0": layer},
        derived={},
        refresh=lambda indices: None,
        reload=lambda layers, tensors: reloaded.extend((name, tensor.tolist()) for name, tensor in tensors),
    )
    applier.keep([("experts.0", torch.zeros(4)), ("experts.1", torch.zeros(6))])
    assert applier.complete and applier.kept_bytes == 4 * 4
    applier.apply_chunk("experts.1", None, 0, torch.ones(3))
    applier.finish()
    assert reloaded == []
    applier.apply_chunk("experts.0", torch.tensor([1, 3]), 0, torch.tensor([5.0, 7.0]))
    applier.finish()
    assert reloaded == [("experts.0", [0.0, 5.0, 0.0, 7.0])]
