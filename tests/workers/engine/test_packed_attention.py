"""Packed sequences: each attends only to itself, padding is small, and unsupported models are detected."""

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from fixtures.engine_cases import actor_config, make_engine, optim_config, train
from fixtures.ranks import run_ranks
from fixtures.tiny import write_tiny_model
from verl.protocol import DataProto
from verl.trainer.ppo.batching import split_mini_batches
from verl.workers.engine import MicroBatching
from verl.workers.engine.packed_attention import PackedSequences, pack_attention

COMMON = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2}


def small(architecture, **over):
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**COMMON, **HEADS, pad_token_id=0, **over)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()


PACKABLE = [("Llama", {}), ("Qwen3", {}), ("Mistral", {"sliding_window": 4}), ("Gemma3Text", {"sliding_window": 4})]


@pytest.mark.parametrize(("architecture", "over"), PACKABLE)
@pytest.mark.parametrize("lengths", [[9], [9, 9, 5, 5, 5, 1], [3, 7, 3]])
def test_a_packed_row_gives_the_logits_and_gradients_of_its_sequences(architecture, over, lengths):
    model = small(architecture, **over)
    sequences = [torch.randint(3, 128, (1, length)) for length in lengths]

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    separate = torch.cat([model(input_ids=ids, use_cache=False).logits[0] for ids in sequences])
    weights = torch.rand_like(separate)
    expected = gradients((separate * weights).sum())
    assert pack_attention(model)
    packed = model(
        input_ids=torch.cat(sequences, dim=1),
        position_ids=torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
        packed_sequences=PackedSequences(lengths),
        use_cache=False,
    ).logits[0]
    torch.testing.assert_close(packed, separate)
    torch.testing.assert_close(gradients((packed * weights).sum()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "over"),
    [
        ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2}),  # attention is not torch's
        (
            "Qwen3Next",
            {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4},
        ),  # linear attention has a state
        ("Llama4Text", {"num_local_experts": 2, "attention_chunk_size": 4}),  # attention within chunks of the row
    ],
)
def test_unsupported_attention_is_not_changed(architecture, over):
    model = small(architecture, **over)
    before = model.config._attn_implementation
    assert not pack_attention(model)
    assert model.config._attn_implementation == before


def test_a_model_that_does_not_pass_keywords_to_attention_is_an_error():
    model = small("Llama")
    assert pack_attention(model)
    ids = torch.randint(3, 128, (1, 5))
    with pytest.raises(NotImplementedError, match="use_remove_padding=False"):
        model(input_ids=ids, use_cache=False)
    with pytest.raises(NotImplementedError, match=r"LlamaForCausalLM does not pass .*use_remove_padding=False"):
        PackedSequences([5]).check_used(model)


def ragged(kind, size=48):
    """Return samples with 16 to 64 prompt tokens, and uniform (32 to 256) or heavy-tailed (8 to 256) responses."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(16, 65, size)
    lengths = rng.integers(32, 257, size) if kind == "uniform" else np.minimum(8 + rng.pareto(1.2, size) * 12, 256)
    columns = np.arange(64 + 256)
    attention = (columns >= 64 - prompts[:, None]) & (columns < 64 + lengths[:, None].astype(int))
    attention = torch.from_numpy(attention.astype(np.int64))
    tokens = torch.from_numpy(rng.integers(4, 80, attention.shape)) * attention
    mask = attention[:, 64:].clone()
    noise = {name: torch.from_numpy(rng.normal(-3, 1, mask.shape)).float() * mask for name in ("old_log_probs",)}
    return DataProto.from_dict(
        tensors={
            "input_ids": tokens,
            "attention_mask": attention,
            "responses": tokens[:, 64:],
            "response_mask": mask,
            "ref_log_prob": noise["old_log_probs"],
            "advantages": torch.from_numpy(rng.normal(0, 1, (size, 1))).float() * mask,
            **noise,
        },
        meta_info={"temperature": 1.0},
    )


def ragged_program(rank, path, cases, options):
    actor = actor_config(optim=optim_config(lr=0.0))
    engine = make_engine(path, actor=actor, **options)
    return [train(engine, shards[rank], limits, actor)[0] for shards, limits in cases]


@pytest.mark.parametrize("kind", ["uniform", "heavy-tailed"])
def test_packed_rows_have_little_padding_and_equal_padded_rows(tmp_path, kind):
    """On two ranks, with both kinds of limits; compared with rows padded to the maximum lengths."""
    path = str(write_tiny_model(tmp_path / "model"))
    data = ragged(kind)
    shards = split_mini_batches(data, len(data), 2)
    limits = [MicroBatching(size=24), MicroBatching(size=5), MicroBatching(max_tokens=4096)]
    packed = run_ranks(2, ragged_program, path, [(shards, limit) for limit in limits], {})[0]
    [padded] = run_ranks(2, ragged_program, path, [(shards, limits[0])], {"use_remove_padding": False})[0]
    assert all(metrics["padding_fraction"] < 0.01 for metrics in packed)
    tokens = float(data.batch["attention_mask"].sum())
    assert padded["padding_fraction"] == pytest.approx(1 - tokens / data.batch["attention_mask"].numel())
    for metrics in packed:
        for name in metrics.keys() - {"padding_fraction"}:
            assert metrics[name] == pytest.approx(padded[name], rel=2e-4, abs=1e-7), name
