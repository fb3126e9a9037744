"""Model directories of known size with random weights; benchmarks of speed do not depend on the values."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen3Config

_COMMON = {"tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# The model of the quickstart, and the shapes of SmolLM2-135M.
CONFIGS = {
    "0.8M": Qwen3Config(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        **_COMMON,
    ),
    "135M": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        **_COMMON,
    ),
}


def _scaled(hidden: int, layers: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        max_position_embeddings=1024,
        **_COMMON,
    )


# Models for growth.py: proportions are similar, so that mainly the size differs.
GROWTH = {
    "1M": _scaled(128, 4, 2048),
    "5M": _scaled(256, 6, 2048),
    "21M": _scaled(384, 12, 4096),
    "59M": _scaled(640, 12, 8192),
    "190M": _scaled(1024, 16, 8192),
    "500M": _scaled(1408, 22, 16384),
}
# Models for probes.py: two with almost no computation and transfers, of different depth; one with few, large layers.
PROBES = {"shallow": GROWTH["1M"], "deep": _scaled(128, 24, 2048), "wide": _scaled(896, 6, 8192)}


def config(size: str) -> PretrainedConfig:
    """Config of a model in `CONFIGS`, `GROWTH` or `PROBES`."""
    return (CONFIGS | GROWTH | PROBES)[size]


def parameters(size: str) -> int:
    """Number of parameters of a model; tied ones count once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(size))
    return sum(parameter.numel() for parameter in model.parameters())


def write_model(size: str, directory: Path) -> Path:
    """Write a model in bfloat16 and a tokenizer with one token per word; return the directory."""
    torch.manual_seed(0)
    shape = config(size)
    AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(directory)
    write_tokenizer(shape.vocab_size, directory)
    return directory


def write_tokenizer(vocabulary: int, directory: Path) -> None:
    """Write a tokenizer with one token per word `w3`, `w4`, ... and a chat template without markers."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocabulary)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<pad>"}
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special).save_pretrained(directory)
