"""The quantization scheme that docs/extending.md adds to verl, from the diff in the document."""

from fixtures.doc_diffs import apply_documented_diff, run_in
from fixtures.tiny import write_tiny_model

CODE = """
import torch

import verl
from verl.config import load_config
from verl.utils.quantization.schemes import SCHEME_NAMES, weight_format
from verl.workers.rollout.quantization import get_scheme

assert verl.__file__.startswith(FOLDER) and "fp8_row" in SCHEME_NAMES
rollout = load_config(["actor_rollout_ref.rollout.quantization=fp8_row"]).actor_rollout_ref.rollout
scheme = get_scheme(rollout, MODEL)
name = "model.layers.0.mlp.up_proj.weight"
weight = torch.randn(80, 96, generator=torch.Generator().manual_seed(0))
weight[3] = 0
received = dict(scheme.encode([(name, weight), ("model.norm.weight", torch.ones(96))]))
assert {key: value.shape for key, value in received.items()} == {
    name: (80, 96), f"{name}_scale": (80, 1), "model.norm.weight": (96,)
}
restored = received[name].float() * received[f"{name}_scale"]
torch.testing.assert_close(restored, weight, rtol=2**-4, atol=1e-2)
rows = scheme.encode_weight(name, weight[10:20])
assert scheme.encodes_rows(name) and torch.equal(rows["_scale"], received[f"{name}_scale"][10:20])
arguments = weight_format(rollout, MODEL).engine_overrides("cuda")["hf_overrides"]["quantization_config"]
assert "lm_head" in arguments["ignore"] and "model.layers.0.mlp.up_proj" not in arguments["ignore"]
"""


def test_documented_scheme_encodes_weights_through_the_registry(tmp_path):
    folder = tmp_path / "verl_with_scheme"
    assert apply_documented_diff("A quantization scheme", folder) == [
        "verl/utils/quantization/schemes/fp8_row.py",
        "verl/utils/quantization/schemes/registry.py",
        "verl/workers/rollout/quantization/fp8_row.py",
    ]
    model = write_tiny_model(tmp_path / "model")
    run_in(folder, f"FOLDER, MODEL = {str(folder)!r}, {str(model)!r}\n{CODE}")
