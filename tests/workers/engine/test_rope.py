"""Rotary embeddings that depend on a length: the same for any arrangement of sequences, and the same as vLLM's."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from fixtures.architectures import architecture_config, longrope, write_architecture
from fixtures.critic_cases import critic_batch, critic_config, make_value_engine, set_head
from fixtures.engine_cases import make_batch, make_engine
from fixtures.ranks import run_ranks
from verl.workers.engine import MicroBatching
from verl.workers.engine.rope import fix_rope_length

ALONE, TOGETHER = MicroBatching(size=1), MicroBatching(size=100)
ORIGINAL = 8  # some samples of `make_batch` are longer
MODELS = {
    "longrope": ("Phi3", {}),
    "longrope of any model": ("Llama", {"max_position_embeddings": 64, "rope_parameters": longrope(ORIGINAL)}),
    "longrope with own scales": (
        "Phimoe",
        {
            "max_position_embeddings": 64,
            "rope_parameters": longrope(ORIGINAL, short_mscale=1.1, long_mscale=1.3),
        },
    ),
    "dynamic": (
        "Llama",
        {
            "max_position_embeddings": ORIGINAL,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0},
        },
    ),
}


@pytest.mark.parametrize("max_model_len", [ORIGINAL, 64])
@pytest.mark.parametrize("kind", MODELS)
def test_log_probs_do_not_depend_on_the_samples_beside(tmp_path, kind, max_model_len):
    architecture, over = MODELS[kind]
    path = write_architecture(tmp_path, architecture, **over)
    data = make_batch(8)
    lengths = data.batch["attention_mask"].sum(1)
    assert lengths.min() <= ORIGINAL < lengths.max()
    # The samples that the engine accepts.
    data = data[(lengths <= max_model_len).numpy()]

    def program(rank, use_remove_padding):
        engine = make_engine(path, use_remove_padding=use_remove_padding, max_model_len=max_model_len)
        return [engine.log_probs(data, limits, calculate_entropy=False).log_probs for limits in (ALONE, TOGETHER)]

    found = [log_probs for packs in (True, False) for log_probs in run_ranks(1, program, packs)[0]]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-4)


def test_values_do_not_depend_on_the_samples_beside(tmp_path):
    path, data = write_architecture(tmp_path, "Phi3"), critic_batch()

    def program(rank):
        engine = make_value_engine(critic_config(path))
        set_head(engine.model)
        return [engine.values(data, limits) for limits in (ALONE, TOGETHER)]

    [(alone, together)] = run_ranks(1, program)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


# Every rope type of transformers with a counterpart in vLLM.
TYPES = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn with scales": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.7,
        "mscale_all_dim": 0.5,
    },
    "yarn with a factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.2,
        "truncate": False,
    },
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": longrope(64),
}


@pytest.mark.parametrize("max_model_len", [64, 256])
@pytest.mark.parametrize("kind", TYPES)
def test_rotary_embeddings_equal_those_of_the_engine(monkeypatch, kind, max_model_len):
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers import rotary_embedding
    from vllm.model_executor.layers.rotary_embedding import phi3_long_rope_scaled_rope

    parameters = {"rope_type": kind, "rope_theta": 10000.0, **TYPES[kind]}
    config = architecture_config("Llama", max_position_embeddings=256, rope_parameters=dict(parameters))
    model = AutoModelForCausalLM.from_config(config).eval()
    fix_rope_length(model, max_model_len)
    engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=max_model_len))
    monkeypatch.setattr(phi3_long_rope_scaled_rope, "get_current_vllm_config", lambda: engine)
    monkeypatch.setattr(rotary_embedding, "_ROPE_DICT", {})
    generator = torch.Generator().manual_seed(0)
    for positions in (torch.arange(5), torch.arange(max_model_len)):
        query = torch.randn(len(positions), 16, generator=generator)
        cos, sin = model.model.rotary_emb(query, positions.unsqueeze(0))
        halves = torch.cat([-query[:, 8:], query[:, :8]], dim=-1)
        with set_current_vllm_config(VllmConfig()):
            rope = rotary_embedding.get_rope(16, 256, rope_parameters=parameters, dtype=torch.float32)
            expected, _ = getattr(rope, "forward_native", rope.forward)(positions, query.clone(), query.clone())
        torch.testing.assert_close(query * cos[0] + halves * sin[0], expected, rtol=0, atol=1e-4)
