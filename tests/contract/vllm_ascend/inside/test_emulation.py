"""The CPU emulation (ascend_cpu, in the main environment's vLLM) and the release hold the same bytes."""

import json
import os
from pathlib import Path

import pytest
from contract.vllm_ascend.emulation import CASES, UPDATES, checkpoint, digests, numbered_weights
from contract.vllm_ascend.harness import RELEASE, build_model, engine, make_vllm_config
from contract.vllm_ascend.updates import Updates, scheme_of, weights_of

EMULATED = os.environ.get("CONTRACT_EMULATION")


@pytest.mark.skipif(EMULATED is None, reason="CONTRACT_EMULATION names the file of emulation.py; test_releases sets it")
@pytest.mark.parametrize("case", CASES)
def test_the_emulation_holds_what_the_release_holds(tmp_path, case):
    if RELEASE == "0.18.0" and "groups" in case:
        pytest.skip("0.18.0 takes multiples of 64 inputs only: test_groups.py")
    expected = json.loads(Path(EMULATED).read_text())[case]
    source = checkpoint(tmp_path, case)
    scheme = scheme_of(source)
    config = make_vllm_config(source, scheme.description.to_json_dict(), load_format="dummy")
    with engine(config):
        model = build_model(config)
        updates = Updates(model, config, scheme)
        for seed in range(UPDATES):
            updates.send(numbered_weights(weights_of(source), seed))
            assert digests(model) == expected[seed]
