"""The chosen attention computes the same as transformers' eager attention, for any arrangement of the sequences."""

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig

from fixtures.architectures import ARCHITECTURES, architecture_config, write_architecture
from fixtures.engine_cases import make_batch, make_engine
from fixtures.ranks import run_ranks
from verl.preflight.attention_parts import uses_eager_attention
from verl.workers.engine import MicroBatching
from verl.workers.engine.attention_choice import AttentionChoice, choose_attention

ALONE, TOGETHER = MicroBatching(size=1), MicroBatching(size=100)


def choose(config, requested=None, packs=True):
    return choose_attention(config, requested, packs=packs, section="model", trust_remote_code=False)


def eager_log_probs(path, data):
    """Return [B, T] log-probabilities of transformers' eager attention in float32, one sample at a time."""
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()
    columns = data.batch
    log_probs = torch.zeros(columns["responses"].shape)
    prompt_width = columns["input_ids"].shape[1] - columns["responses"].shape[1]
    for row, (ids, mask) in enumerate(zip(columns["input_ids"], columns["attention_mask"].bool(), strict=True)):
        with torch.no_grad():
            logits = model(input_ids=ids[mask].unsqueeze(0), use_cache=False).logits[0]
        log_p = (logits / data.meta_info["temperature"]).log_softmax(-1)
        prompt = int(mask[:prompt_width].sum())
        for column in range(int(mask[prompt_width:].sum())):
            log_probs[row, column] = log_p[prompt + column - 1, ids[prompt_width + column]]
    return log_probs * columns["response_mask"]


# One architecture for each kind of attention, and all others in the slow tests; for Phi3 see test_rope.py.
FIRST = ("Llama", "Gemma2", "GptOss")
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES if name not in (*FIRST, "Phi3")]


@pytest.mark.parametrize("architecture", [*FIRST, *OTHERS])
def test_the_engine_computes_what_eager_attention_computes(tmp_path, architecture):
    path = write_architecture(tmp_path, architecture)
    data = make_batch(8)
    expected = eager_log_probs(path, data)

    def program(rank, use_remove_padding):
        engine = make_engine(path, use_remove_padding=use_remove_padding)
        return [engine.log_probs(data, limits, calculate_entropy=False).log_probs for limits in (ALONE, TOGETHER)]

    for use_remove_padding in (True, False):
        for found in run_ranks(1, program, use_remove_padding)[0]:
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


# Eager attention for soft caps (Gemma 2), sinks (GPT-OSS) and ALiBi (Bloom, Falcon); rows for a model that does not
# pass keywords to its attention.
CHOICES = {
    "Gemma2": AttentionChoice("eager", False),
    "GptOss": AttentionChoice("eager", False),
    "Bloom": AttentionChoice("eager", False),
    "Falcon": AttentionChoice("eager", False),
    "StableLm": AttentionChoice("sdpa", False),
}


@pytest.mark.parametrize("architecture", [*FIRST, *OTHERS, pytest.param("Phi3", marks=pytest.mark.slow)])
def test_choices(architecture):
    config = architecture_config(architecture)
    before = config.to_dict()
    expected = CHOICES.get(architecture, AttentionChoice("sdpa", True))
    assert choose(config) == expected
    assert uses_eager_attention(before) == (expected.implementation == "eager"), "for the memory estimate"
    assert choose(config, packs=False) == expected._replace(packs=False)
    assert choose(config, "eager") == AttentionChoice("eager", False)
    assert config.to_dict() == before


def test_a_model_without_soft_caps_keeps_the_fast_attention():
    assert choose(architecture_config("Gemma2", attn_logit_softcapping=None)) == AttentionChoice("sdpa", True)


def test_the_slower_attention_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        choose(architecture_config("Gemma2"))
    assert "sdpa attention ignores a part of the attention of Gemma2ForCausalLM" in caplog.text


@pytest.mark.parametrize("architecture", ["Gemma2", "Falcon"])
def test_a_requested_attention_that_ignores_a_part_is_an_error(architecture):
    with pytest.raises(ValueError, match=r"override_config\.attn_implementation=sdpa: .*eager"):
        choose(architecture_config(architecture), "sdpa")


@pytest.mark.parametrize("requested", [None, "eager"])
@pytest.mark.parametrize(
    "config", [architecture_config("Gemma3Text", use_bidirectional_attention=True), BertConfig(num_hidden_layers=2)]
)
def test_a_model_that_is_not_causal_is_an_error(config, requested):
    with pytest.raises(ValueError, match=r"model\.path: .* computes a token from tokens after it"):
        choose(config, requested)


def test_a_layer_that_ignores_its_window_is_not_packed(monkeypatch):
    """A sliding window that the model applies by its mask only is lost in a packed row."""
    from transformers.models.mistral import modeling_mistral

    forward = modeling_mistral.MistralAttention.forward

    def without_window(self, *args, **options):
        self.config = _Hidden(self.config)
        return forward(self, *args, **options)

    class _Hidden:
        sliding_window = None

        def __init__(self, config):
            self._config = getattr(config, "_config", config)

        def __getattr__(self, name):
            return getattr(self._config, name)

    monkeypatch.setattr(modeling_mistral.MistralAttention, "forward", without_window)
    assert choose(architecture_config("Mistral")) == AttentionChoice("sdpa", False)


def test_a_model_that_cannot_be_tried_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        assert choose(architecture_config("Llama", hidden_act="none")) == AttentionChoice(None, False)
    assert "LlamaConfig does not run (KeyError" in caplog.text


def test_rotary_embeddings_of_own_code_that_depend_on_the_length_are_refused(monkeypatch):
    """As in the code that came with Phi-3 before transformers had it: no `rope_type` tells the kind."""
    from transformers.models.llama import modeling_llama

    class Rotary(torch.nn.Module):
        def __init__(self, config, device=None):
            super().__init__()
            self.original = config.original_max_position_embeddings
            self.size = config.hidden_size // config.num_attention_heads

        def forward(self, x, position_ids):
            base = 100.0 if position_ids.max() < self.original else 1000.0
            frequencies = base ** (-torch.arange(0, self.size, 2) / self.size)
            angles = (position_ids[..., None] * frequencies).repeat(1, 1, 2)
            return angles.cos(), angles.sin()

    monkeypatch.setattr(modeling_llama, "LlamaRotaryEmbedding", Rotary)
    config = architecture_config("Llama", head_dim=None)
    config.original_max_position_embeddings = 4096
    with pytest.raises(ValueError, match="its own code scales rotary embeddings"):
        choose(config)
