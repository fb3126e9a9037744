"""A directory with everything that a config needs to pass `check`, made without torch."""

import functools
import json
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

MODEL_CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def write_safetensors(path, tensors, cut=0):
    """Float32 zeros of the given {name: shape}; the last `cut` bytes are left out."""
    header, end = {}, 0
    for name, shape in tensors.items():
        elements = 1
        for extent in shape:
            elements *= extent
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + 4 * elements]}
        end += 4 * elements
    raw = json.dumps(header).encode()
    content = struct.pack("<Q", len(raw)) + raw + bytes(end)
    Path(path).write_bytes(content[: len(content) - cut])


def write_prompts(path, count, **columns):
    """`count` rows; `columns` add to, replace or (None) drop a column."""
    row = {
        "prompt": [{"role": "user", "content": "ab"}],
        "data_source": "letters",
        "reward_model": {"style": "rule", "ground_truth": "ba"},
    } | columns
    row = {name: value for name, value in row.items() if value is not None}
    if Path(path).suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row] * count), path)
    else:
        Path(path).write_text("".join(json.dumps(row) + "\n" for _ in range(count)))
    return Path(path)


class RunFiles:
    """Model, data and reward function; `overrides` is a command line that passes every check."""

    write_prompts = staticmethod(write_prompts)
    write_safetensors = staticmethod(write_safetensors)

    def __init__(self, root):
        self.root = Path(root)
        self.model = self.root / "model"
        self.model.mkdir()
        (self.model / "config.json").write_text(json.dumps(MODEL_CONFIG))
        (self.model / "tokenizer.json").write_text("{}")
        self.weights = self.model / "model.safetensors"
        write_safetensors(self.weights, {"embed": (32, 16), "layer.0": (16, 48), "norm": (16,)})
        self.train = write_prompts(self.root / "train.parquet", 40)
        self.val = write_prompts(self.root / "val.parquet", 4)
        self.reward = self.root / "reward.py"
        self.reward.write_text(
            "def compute_score(data_source, solution_str, ground_truth, extra_info):\n    return 0.0\n"
        )
        self.out = self.root / "out"

    def overrides(self, **changes):
        """`a__b=1` in `changes` stands for `a.b=1`, None leaves a key out."""
        keys = {
            "algorithm.adv_estimator": "grpo",
            "data.train_files": self.train,
            "data.val_files": self.val,
            "data.train_batch_size": 8,
            "data.max_prompt_length": 16,
            "data.max_response_length": 16,
            "actor_rollout_ref.model.path": self.model,
            "actor_rollout_ref.actor.ppo_mini_batch_size": 4,
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 2,
            "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
            "actor_rollout_ref.rollout.n": 4,
            "reward.custom_reward_function.path": self.reward,
            "trainer.device": "cpu",
            "trainer.n_gpus_per_node": 1,
            "trainer.default_local_dir": self.out,
        }
        keys |= {name.replace("__", "."): value for name, value in changes.items()}
        return [f"{name}={value}" for name, value in keys.items() if value is not None]


@pytest.fixture
def run_files(tmp_path):
    return RunFiles(tmp_path)


@pytest.fixture
def plan_of(run_files):
    """The plan of the valid config with changes."""
    from verl.trainer.config import check

    return lambda **changes: check(with_overrides(run_files.overrides(**changes)))


def with_overrides(overrides):
    """What `load_config` makes of them; without Hydra, whose composing takes most of a test's time."""
    from verl.trainer.config import PPOConfig
    from verl.trainer.config.build import convert, key_types

    config = PPOConfig()
    for override in overrides:
        name, _, text = override.partition("=")
        section, _, last = name.rpartition(".")
        owner = functools.reduce(getattr, section.split(".") if section else [], config)
        setattr(owner, last, convert(yaml.safe_load(text), key_types(PPOConfig)[name]))
    return config


@pytest.fixture
def problems_of(plan_of):
    """What `check` says is wrong with the valid command line and changes."""
    from verl.trainer.config import ConfigError

    def problems(**changes):
        with pytest.raises(ConfigError) as caught:
            plan_of(**changes)
        return list(caught.value.problems)

    return problems


@pytest.fixture
def problem_of(problems_of):
    """The same where exactly one thing is wrong."""

    def problem(**changes):
        found = problems_of(**changes)
        assert len(found) == 1, found
        return found[0]

    return problem
