"""The chunked output head trains as the plain one, and models that it cannot serve get the plain one or an error."""

import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from fixtures.architectures import ARCHITECTURES, architecture_config, write_architecture
from fixtures.engine_cases import actor_config, make_batch, make_engine, optim_config
from fixtures.head_cases import head_program
from fixtures.mask_cases import with_sampling_masks
from fixtures.ranks import run_ranks
from fixtures.tiny import write_tiny_model
from verl.trainer.ppo.batching import split_mini_batches
from verl.workers.engine import MicroBatching
from verl.workers.engine.micro_batch import AlignedBatch, Layout
from verl.workers.engine.output_head import OutputHead, try_chunked_head

LORA = {"lora_rank": 4, "target_modules": ["q_proj", "lm_head"]}


def write_model(path, name):
    """Write a tiny model, all with an output head of 128 rows."""
    if name in ("tied", "untied"):
        return str(write_tiny_model(path, tied=name == "tied"))
    return write_architecture(path, name, **({"final_logit_softcapping": 2.0} if name == "Gemma2" else {}))


@pytest.mark.parametrize(
    ("model", "ranks", "limits", "options"),
    [
        ("tied", 1, MicroBatching(size=5), {}),
        ("tied", 2, MicroBatching(max_tokens=40), {"enable_gradient_checkpointing": True}),
        pytest.param("untied", 2, MicroBatching(size=4), LORA, marks=pytest.mark.slow),
        pytest.param("untied", 1, MicroBatching(size=4), LORA, marks=pytest.mark.slow),
        pytest.param("untied", 2, MicroBatching(size=5), {"use_remove_padding": False}, marks=pytest.mark.slow),
        ("Gemma2", 1, MicroBatching(size=5), {}),
        pytest.param("Cohere", 2, MicroBatching(size=5), {}, marks=pytest.mark.slow),
        pytest.param("Granite", 1, MicroBatching(size=5), {}, marks=pytest.mark.slow),
    ],
)
def test_three_steps_equal_those_of_the_plain_head(tmp_path, model, ranks, limits, options):
    path = write_model(tmp_path, model)
    # AdamW divides gradients by their size, so a tiny gradient's rounding changes a weight by a part of the rate.
    actor = actor_config(optim=optim_config(lr=1e-5))
    data = with_sampling_masks(make_batch(13), vocab_size=80)
    shards = split_mini_batches(data, 5, ranks)
    plain, chunked = (run_ranks(ranks, head_program, path, actor, shards, limits, on, options) for on in (False, True))
    for (history, before, gradients, weights), (expected, old, exact, trained) in zip(chunked, plain, strict=True):
        assert len(history) == len(expected) == 3
        for found, wanted in zip(history, expected, strict=True):
            assert found == pytest.approx(wanted, rel=1e-6, abs=1e-6)
        for found, wanted in zip(before, old, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)
        assert_near(gradients, exact, 1e-5)
        assert_near(weights, trained, 1e-6)
        assert any(name.startswith(("lm_head", "model.embed_tokens")) and exact[name].any() for name in exact)


def assert_near(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        difference = (found[name] - tensor).abs().max().item()
        assert difference <= tolerance, f"{name}: {difference}"


# ---- the choice -----------------------------------------------------------------------------------------------------


def small_batch():
    [micro_batch] = AlignedBatch(make_batch(4), torch.device("cpu"), Layout.ROWS).micro_batches(
        MicroBatching(size=4), None
    )
    return micro_batch


def tiny_llama(forward=None):
    """Return a tiny Llama, whose logits pass `forward`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(architecture_config("Llama"), dtype=torch.float32).eval()
    if forward is not None:
        model.forward = changed(model.forward, forward)
    return model


def changed(forward, change):
    def call(*args, **inputs):
        output = forward(*args, **inputs)
        output.logits = change(output.logits)
        return output

    return call


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits.clamp(-0.1, 0.1),
        lambda logits: logits[..., :100],
        lambda logits: torch.cat([logits[..., :9] - 1.0, logits[..., 9:]], dim=-1),
    ],
    ids=["clamped", "cut", "some are lower"],
)
def test_other_operations_on_logits_keep_the_plain_head(caplog, change):
    micro_batch = small_batch()
    expected = OutputHead(tiny_llama(change), False).log_probs(micro_batch, 0.7, sum_pi_squared=True)
    with caplog.at_level(logging.WARNING):
        head = OutputHead(tiny_llama(change), None)
        found = head.log_probs(micro_batch, 0.7, sum_pi_squared=True)
    assert not head.chunked and "LlamaForCausalLM: it changes the logits" in caplog.text
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"use_fused_kernels=True is not supported for LlamaForCausalLM: it changes"):
        OutputHead(tiny_llama(change), True).log_probs(micro_batch, 0.7)


def test_a_head_that_is_no_linear_layer_keeps_the_plain_head(caplog):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    def model():
        model = tiny_llama()
        model.lm_head = Doubled(64, 128, bias=False)
        return model

    with caplog.at_level(logging.WARNING):
        assert not OutputHead(model(), None).chunked
    assert "its output head is a Doubled, not a linear layer" in caplog.text
    with pytest.raises(ValueError, match=r"use_fused_kernels=True is not supported .*Doubled"):
        OutputHead(model(), True)


def test_a_quantized_head_keeps_the_plain_head(caplog):
    model = tiny_llama()
    model.lm_head.forward = lambda x: torch.nn.functional.linear(x, model.lm_head.weight.round())
    with caplog.at_level(logging.WARNING):
        assert not OutputHead(model, None).chunked
    assert "quantization-aware training" in caplog.text


def test_a_request_that_cannot_be_served_fails_before_the_first_step(tmp_path, monkeypatch):
    path = write_architecture(tmp_path, "Llama")
    monkeypatch.setattr(LlamaForCausalLM, "forward", changed_method(LlamaForCausalLM.forward))

    def program(rank, requested):
        return make_engine(path, use_fused_kernels=requested).output_head

    run_ranks(1, program, None)
    with pytest.raises(ValueError, match=r"use_fused_kernels=True is not supported for LlamaForCausalLM"):
        run_ranks(1, program, True)


def changed_method(forward):
    def call(self, *args, **inputs):
        output = forward(self, *args, **inputs)
        output.logits = output.logits.clamp(-0.1, 0.1)
        return output

    return call


@pytest.mark.parametrize("architecture", ["Llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES)])
def test_known_architectures_have_the_chunked_head(architecture):
    try_chunked_head(architecture_config(architecture), False)


def test_a_small_copy_that_does_not_run_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        try_chunked_head(architecture_config("Llama", hidden_act="unknown"), False)
    assert "LlamaConfig: a small copy does not run" in caplog.text


@pytest.mark.parametrize("requested", [None, False])
def test_a_model_with_an_unrestricted_head_is_rejected(requested):
    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(4, 8)

        def get_output_embeddings(self):
            return self.head

        def forward(self, input_ids, **_):
            self.head(torch.zeros(*input_ids.shape, 4))
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 8))

    model = Wide()
    with pytest.raises(NotImplementedError, match="Wide returned logits of shape"):
        OutputHead(model, requested).log_probs(small_batch(), 1.0)
