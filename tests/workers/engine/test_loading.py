"""Loading a checkpoint: missing and mismatched weights are errors."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fixtures.engine_cases import export_program, make_engine
from fixtures.ranks import run_ranks
from fixtures.tiny import write_tiny_model
from verl.workers.engine.loading import parse_dtype


def make_engine_with(rank, model_dir, override_config):
    make_engine(model_dir, override_config=override_config)


@pytest.fixture
def model_dir(tmp_path):
    return write_tiny_model(tmp_path / "model", tied=False)


def rewrite(directory, change):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_missing_weight_is_an_error(model_dir):
    rewrite(model_dir, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"model\.path=.*missing_keys: lm_head\.weight"):
        run_ranks(1, export_program, str(model_dir), None)


def test_a_wrong_shape_is_an_error(model_dir):
    rewrite(model_dir, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises((ValueError, RuntimeError), match=r"model\.norm\.weight|mismatch"):
        run_ranks(1, export_program, str(model_dir), None)


def test_override_config_reaches_the_model(model_dir):
    def program(rank):
        engine = make_engine(model_dir, override_config={"rms_norm_eps": 0.25, "attn_implementation": "eager"})
        return engine.model.config, engine.model.model.norm.variance_epsilon

    [(config, eps)] = run_ranks(1, program)
    assert config._attn_implementation == "eager"
    assert config.rms_norm_eps == eps == 0.25


def test_an_unknown_key_of_override_config_is_an_error(model_dir):
    with pytest.raises(ValueError, match=r"override_config: unknown key rms_eps for Qwen3Config; see .*config\.json"):
        run_ranks(1, make_engine_with, str(model_dir), {"rms_eps": 0.25})


def test_parse_dtype_accepts_known_names_only():
    assert parse_dtype("bf16", "x") is torch.bfloat16
    with pytest.raises(ValueError, match=r"fsdp_config\.model_dtype='fp8'.*bf16"):
        parse_dtype("fp8", "fsdp_config.model_dtype")
