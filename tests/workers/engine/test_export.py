"""What the engine streams and writes equals what `save_pretrained` writes."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fixtures.engine_cases import actor_config, export_program, fsdp_config, make_engine
from fixtures.ranks import run_ranks
from fixtures.tiny import write_tiny_model
from verl.workers.engine import export

CASES = [
    ("qwen3", True),
    ("qwen3", False),
    ("llama", True),
    ("llama", False),
    ("qwen3_moe", True),
    ("qwen3_moe", False),
]


def saved(directory):
    return load_file(f"{directory}/model.safetensors")


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("kind", "tied"), CASES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_stream_and_directory(tmp_path, kind, tied, ranks):
    source = write_tiny_model(tmp_path / "source", kind=kind, tied=tied, num_key_value_heads=1)
    expected = saved(source)
    if kind == "qwen3_moe":
        assert "model.layers.0.mlp.experts.3.up_proj.weight" in expected
    assert ("lm_head.weight" in expected) != tied
    for weights in run_ranks(ranks, export_program, str(source), str(tmp_path / "hf")):
        assert_same(weights, expected)
    assert_same(saved(tmp_path / "hf"), expected)
    # the directory is whole: model and tokenizer come back, and are the same
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    original = AutoModelForCausalLM.from_pretrained(source)
    assert model.config.architectures == original.config.architectures
    assert model.generation_config.to_diff_dict() == original.generation_config.to_diff_dict()
    ids = torch.arange(4, 30).unsqueeze(0)
    assert torch.equal(model(input_ids=ids).logits, original(input_ids=ids).logits)
    tokenizer, first = AutoTokenizer.from_pretrained(tmp_path / "hf"), AutoTokenizer.from_pretrained(source)
    message = [{"role": "user", "content": "abc"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == first.apply_chat_template(message, tokenize=False)
    assert tokenizer("hello")["input_ids"] == first("hello")["input_ids"]


def test_tensors_stand_alone(tmp_path):
    """Contiguous, and not one storage for many: a receiver copies bytes."""
    source = write_tiny_model(tmp_path / "source", kind="qwen3_moe")

    def program(rank):
        return [(name, t.is_contiguous()) for name, t in make_engine(source).export_weights()]

    [found] = run_ranks(1, program)
    assert all(contiguous for _, contiguous in found)
    assert len({name for name, _ in found}) == len(found)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_no_more_than_a_layer_is_gathered_at_once(tmp_path, kind, monkeypatch):
    source = write_tiny_model(tmp_path / "source", kind=kind, num_hidden_layers=4)
    gathered = []
    whole = export._whole
    monkeypatch.setattr(export, "_whole", lambda tensor, dtype: gathered.append(tensor.numel()) or whole(tensor, dtype))

    def program(rank):
        counts = []
        for _ in make_engine(source).export_weights():
            counts.append(len(gathered))
        return counts

    [counts] = run_ranks(1, program)
    jumps = [b - a for a, b in zip([0, *counts], counts, strict=False)]
    assert max(jumps) == (11 if kind == "qwen3_moe" else 1)
    assert sum(gathered) == sum(t.numel() for t in saved(source).values())


def test_bfloat16_masters(tmp_path):
    source = write_tiny_model(tmp_path / "source", dtype="bfloat16")
    actor = actor_config(fsdp_config=fsdp_config(model_dtype="bf16", dtype="bfloat16"))
    for weights in run_ranks(2, export_program, str(source), str(tmp_path / "hf"), actor):
        assert_same(weights, saved(source))
    assert_same(saved(tmp_path / "hf"), saved(source))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16


def test_several_files(tmp_path, monkeypatch):
    source = write_tiny_model(tmp_path / "source", tied=False)
    monkeypatch.setattr(export, "_SHARD_BYTES", 100_000)
    run_ranks(1, export_program, str(source), str(tmp_path / "hf"))
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    expected = AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
