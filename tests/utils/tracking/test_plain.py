"""Plain values, JSON without NaN, and masked secrets."""

import json
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import pytest
import torch

from verl.utils.tracking.plain import mask_secrets, to_json, to_plain


def test_numpy_and_torch_values_become_python():
    values = [np.float32(0.5), np.int64(3), np.bool_(True), torch.tensor(2.0), np.array(4), np.array([1, 2]), (1, "a")]
    plain = to_plain(values)
    assert plain == [0.5, 3, True, 2.0, 4, [1, 2], [1, "a"]]
    assert [type(value) for value in plain[:5]] == [float, int, bool, float, int]


def test_a_value_without_plain_form_is_an_error_or_its_text():
    with pytest.raises(TypeError, match="Fraction"):
        to_plain({"a": Fraction(1, 3)})
    with pytest.raises(TypeError, match="Tensor"):
        to_plain(torch.zeros(2))
    assert to_plain({"a": Fraction(1, 3)}, lenient=True) == {"a": "1/3"}


def test_json_has_no_nan():
    line = to_json({"a": float("nan"), "b": [np.float64("inf"), {"c": -np.inf}], "d": 1.5, "e": "\u00e4\n"})
    assert "\n" not in line
    assert json.loads(line, parse_constant=pytest.fail) == {
        "a": None,
        "b": [None, {"c": None}],
        "d": 1.5,
        "e": "\u00e4\n",
    }


@dataclass
class Inner:
    api_key: str = "sk-1"
    max_num_batched_tokens: int = 8192


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    prompt_key: str = "prompt"


def test_secrets_are_masked():
    config = {
        "WANDB_API_KEY": "s1",
        "hf_token": "s2",
        "dbPassword": "s3",
        "aws_secret_access_key": "s4",
        "api_keys": ["s5", "s6"],
        "secrets": {"a": {"b": "s7"}, "n": 8, "off": None},
        "client-secret-file": "s8",
        "proxy": "http://me:s9@host:8080/x",
        "env": [{"name": "x", "OPENAI_KEY": "s10"}],
        "headers": {"Authorization": "Bearer s11"},
        "pin_password": 1234,
    }
    masked = mask_secrets(config)
    text = json.dumps(masked)
    assert not [f"s{i}" for i in range(1, 12) if f'"s{i}"' in text or f"s{i}@" in text or f" s{i}" in text]
    assert "1234" not in text
    assert masked["proxy"] == "http://me:***@host:8080/x"
    assert masked["secrets"] == {"a": {"b": "***"}, "n": "***", "off": None}
    assert config["hf_token"] == "s2", "the config itself stays as it was"


def test_public_keys_are_not_masked():
    config = {
        "prompt_key": "prompt",
        "reward_fn_key": "data_source",
        "ppo_max_token_len_per_gpu": 16384,
        "max_tokens": 16,
        "stop_token_ids": [1, 2],
        "ignore_eos_token": False,
        "tokenizer": "path/to",
        "api_key": None,
        "password": "",
        "url": "http://host:8000/v1",
        "logger": ["console", "file"],
    }
    assert mask_secrets(config) == config


def test_dataclasses_and_other_objects_become_plain():
    masked = mask_secrets(Outer())
    assert masked == {"inner": {"api_key": "***", "max_num_batched_tokens": 8192}, "prompt_key": "prompt"}
    assert mask_secrets({"dtype": torch.bfloat16}) == {"dtype": "torch.bfloat16"}


def test_half_a_character_is_replaced_everywhere():
    value = {"\ud83d": ["a\udc80", Fraction(1, 3)]}
    assert to_plain(value, lenient=True) == {"\ufffd": ["a\ufffd", "1/3"]}
    to_json(value).encode()
    assert mask_secrets({"path": "/tmp/\udcff"}) == {"path": "/tmp/\ufffd"}
