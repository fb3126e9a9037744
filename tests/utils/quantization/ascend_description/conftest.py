"""Fixtures: header-only checkpoints of real and of tiny models."""

import pytest

from fixtures.header_checkpoint import small_decoder, tensors_of_config, write_header_checkpoint
from fixtures.model_configs import CONFIGS


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """Return the directory of a real model by name; each is made once."""
    made = {}

    def make(name):
        if name not in made:
            config = CONFIGS[name]()
            tensors = tensors_of_config(config)
            if name == "DeepSeek-V3":
                # Its checkpoint has the layers of multi-token prediction, which transformers drops.
                for key in [key for key in tensors if key.startswith("model.layers.4.")]:
                    tensors[key.replace(".4.", ".5.", 1)] = tensors[key]
                tensors["model.layers.5.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
                tensors["model.layers.5.eh_proj.weight"] = ((7168, 14336), "BF16")
                tensors["model.layers.5.shared_head.head.weight"] = tensors["lm_head.weight"]
            shards = 3 if name in ("Qwen3-30B-A3B", "DeepSeek-V3") else 1
            directory = tmp_path_factory.mktemp("models") / name
            made[name] = write_header_checkpoint(directory, config.to_dict(), tensors, shards=shards)
        return made[name]

    return make


@pytest.fixture
def dense(tmp_path):
    return write_header_checkpoint(tmp_path / "dense", *small_decoder())


@pytest.fixture
def moe(tmp_path):
    return write_header_checkpoint(tmp_path / "moe", *small_decoder(experts=4))
