"""Exported weights equal those that `save_pretrained` writes."""

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM, AutoTokenizer

from fixtures.engine_cases import (
    actor_config,
    encoded_program,
    export_program,
    fsdp_config,
    make_engine,
    scheme_program,
)
from fixtures.fake_quant import mxfp8_round_trip
from fixtures.ranks import run_ranks
from fixtures.sent_cases import turned
from fixtures.tiny import write_tiny_model
from verl.workers.engine import export, export_rows

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
def test_exported_weights_and_directory_equal_the_checkpoint(tmp_path, kind, tied, ranks):
    source = write_tiny_model(tmp_path / "source", kind=kind, tied=tied, num_key_value_heads=1)
    expected = saved(source)
    if kind == "qwen3_moe":
        assert "model.layers.0.mlp.experts.3.up_proj.weight" in expected
    assert ("lm_head.weight" in expected) != tied
    for weights in run_ranks(ranks, export_program, str(source), str(tmp_path / "hf")):
        assert_same(weights, expected)
    assert_same(saved(tmp_path / "hf"), expected)
    # The directory is complete: model and tokenizer load from it and are the same.
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


def test_exported_tensors_are_contiguous_and_unique(tmp_path):
    """A receiver copies the bytes of each tensor."""
    source = write_tiny_model(tmp_path / "source", kind="qwen3_moe")

    def program(rank):
        return [(name, t.is_contiguous()) for name, t in make_engine(source).export_weights()]

    [found] = run_ranks(1, program)
    assert all(contiguous for _, contiguous in found)
    assert len({name for name, _ in found}) == len(found)


@pytest.mark.parametrize(
    ("kind", "joined", "most"), [("qwen3", False, 1), ("qwen3_moe", False, 1), ("qwen3_moe", True, 2)]
)
def test_only_parameters_that_are_converted_together_are_gathered_at_once(tmp_path, kind, joined, most, monkeypatch):
    """With `joined`, the conversion transposes experts, so the packed experts of a layer have no row ranges."""
    source = write_tiny_model(tmp_path / "source", kind=kind, num_hidden_layers=4)
    if joined:
        monkeypatch.setattr(
            export_rows, "revert_weight_conversion", turned(export_rows.revert_weight_conversion, "exp")
        )
    gathered = []
    cast = export._cast
    monkeypatch.setattr(export, "_cast", lambda tensor, dtype: gathered.append(tensor.numel()) or cast(tensor, dtype))

    def program(rank):
        units = list(make_engine(source).export_units())
        gathered.clear()
        counts = []
        for unit in units:
            unit.gather()
            counts.append(len(gathered))
        return counts

    [counts] = run_ranks(1, program)
    jumps = [b - a for a, b in zip([0, *counts], counts, strict=False)]
    assert max(jumps) == most
    assert sum(gathered) == sum(t.numel() for t in saved(source).values())


def test_bfloat16_master_weights_are_exported_as_bfloat16(tmp_path):
    source = write_tiny_model(tmp_path / "source", dtype="bfloat16")
    actor = actor_config(fsdp_config=fsdp_config(model_dtype="bf16", dtype="bfloat16"))
    for weights in run_ranks(2, export_program, str(source), str(tmp_path / "hf"), actor):
        assert_same(weights, saved(source))
    assert_same(saved(tmp_path / "hf"), saved(source))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["glm4_moe", "deepseek_v3"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_bias_of_a_router_stays_float32_in_a_bfloat16_model(tmp_path, kind, ranks):
    source = write_tiny_model(tmp_path / "source", kind=kind, tied=False)
    exact = "e_score_correction_bias"
    expected = {name: t if name.endswith(exact) else t.bfloat16() for name, t in saved(source).items()}
    actor = actor_config(fsdp_config=fsdp_config(model_dtype="bf16", dtype="bfloat16"))
    for weights in run_ranks(ranks, export_program, str(source), str(tmp_path / "hf"), actor):
        assert_same(weights, expected)
    # The files have the dtype of the source, and the values that bfloat16 left.
    assert_same(saved(tmp_path / "hf"), {name: tensor.float() for name, tensor in expected.items()})


# ---- encoding before the gather ----

Q_PROJ, EXPERT = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_rank_encodes_the_rows_that_it_holds(tmp_path, ranks):
    """A key projection of six rows, and a query projection of 24 rows."""
    source = write_tiny_model(tmp_path, num_key_value_heads=1, head_dim=3 * 2, num_attention_heads=4)
    k_proj = "model.layers.0.self_attn.k_proj.weight"
    outcomes = run_ranks(ranks, encoded_program, str(source), {Q_PROJ, k_proj})
    expected = saved(source)
    for weights, encoded in outcomes:
        assert set(weights) == set(expected) | {f"{Q_PROJ}_sum", f"{k_proj}_sum"}
        for name, tensor in expected.items():
            if name in (Q_PROJ, k_proj):
                assert torch.equal(weights[name].view(torch.uint8), tensor.to(torch.float8_e4m3fn).view(torch.uint8))
                assert torch.equal(weights[f"{name}_sum"], tensor.sum(-1, keepdim=True))
            else:
                assert torch.equal(weights[name], tensor)
        assert [name for name, _ in encoded] == [k_proj, Q_PROJ]
    for name in (k_proj, Q_PROJ):
        rows = [dict(encoded)[name][0] for _, encoded in outcomes]
        assert sum(rows) == expected[name].shape[0] and max(rows) == -(-expected[name].shape[0] // ranks)


@pytest.mark.parametrize("ranks", [1, 2])
def test_packed_experts_are_encoded_before_they_are_split(tmp_path, ranks):
    source = write_tiny_model(tmp_path, kind="qwen3_moe", hidden_size=64, moe_intermediate_size=64)
    expected = saved(source)
    names = {name for name in expected if ".experts." in name}
    for weights, encoded in run_ranks(ranks, encoded_program, str(source), names):
        assert {name for name, _ in encoded} == {
            f"model.layers.{i}.mlp.experts.{part}" for i in range(2) for part in ("gate_up_proj", "down_proj")
        }
        for name in names:
            assert torch.equal(
                weights[name].view(torch.uint8), expected[name].to(torch.float8_e4m3fn).view(torch.uint8)
            )
            assert torch.equal(weights[f"{name}_sum"], expected[name].sum(-1, keepdim=True))


def test_packed_experts_are_gathered_first_if_only_some_are_encoded(tmp_path):
    source = write_tiny_model(tmp_path, kind="qwen3_moe")
    names = {name for name in saved(source) if ".experts." in name} - {EXPERT}
    [(weights, encoded)] = run_ranks(1, encoded_program, str(source), names)
    assert all("gate_up_proj" not in name or "layers.1" in name for name, _ in encoded) and encoded
    assert torch.equal(weights[EXPERT], saved(source)[EXPERT])


def test_a_conversion_that_transposes_square_matrices_is_detected(tmp_path, monkeypatch):
    source = write_tiny_model(tmp_path, kind="qwen3_moe", hidden_size=64, moe_intermediate_size=64)
    names = {name for name in saved(source) if ".experts." in name}
    convert = turned(export_rows.revert_weight_conversion, "up_proj", "gate_proj")
    monkeypatch.setattr(export_rows, "revert_weight_conversion", convert)
    [(_, encoded)] = run_ranks(1, encoded_program, str(source), names)
    assert {name.rpartition(".")[2] for name, _ in encoded} == {"down_proj"}


def test_shards_of_columns_have_no_local_rows():
    def program(rank):
        mesh = init_device_mesh("cpu", (1,))
        shards = [DTensor.from_local(torch.randn(8, 4), mesh, [Shard(i)], run_check=False) for i in (0, 1)]
        return [export_rows.local_rows(shard, rank) for shard in shards]

    assert run_ranks(1, program) == [[export_rows.LocalRows(0, sends=True), None]]


def test_shards_are_cast_before_they_are_gathered(tmp_path):
    source = write_tiny_model(tmp_path)
    for weights, _ in run_ranks(2, encoded_program, str(source), set(), "bfloat16"):
        assert_same(weights, {name: tensor.bfloat16() for name, tensor in saved(source).items()})


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("ranks", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_trainer_sends_each_checkpoint_weight_in_mxfp8(tmp_path, kind, ranks):
    source = write_tiny_model(tmp_path, kind=kind, hidden_size=96)
    (sent, _), *others = outcomes = run_ranks(ranks, scheme_program, str(source))
    assert all(nothing == {} for nothing, _ in others)
    for name, tensor in saved(source).items():
        rounded = mxfp8_round_trip(tensor.bfloat16())
        if f"{name}_scale" in sent:
            scale = torch.exp2(sent[f"{name}_scale"].double() - 127).repeat_interleave(32, -1)
            assert torch.equal(sent[name].double() * scale[:, : tensor.shape[-1]], rounded.double())
        else:
            assert torch.equal(sent[name], tensor.bfloat16())
    assert f"{Q_PROJ}_scale" in sent and (kind == "qwen3" or f"{EXPERT}_scale" in sent)
    for _, report in outcomes:
        assert Q_PROJ in report["errors"] and report["seconds"] > 0


@pytest.mark.parametrize("row", [0, -1])
@pytest.mark.parametrize("name", [Q_PROJ, "model.embed_tokens.weight"])
def test_a_non_finite_weight_on_any_rank_is_rejected_and_no_rank_hangs(tmp_path, name, row):
    source = write_tiny_model(tmp_path)
    (error, _), _ = run_ranks(2, scheme_program, str(source), (name, row))
    assert f"'{name}' holds NaN or Inf" in error
