"""LoRA adapters compared with peft: training, export, checkpoints, and adapters to start from."""

import functools
import json
import re
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fixtures.engine_cases import actor_config, fsdp_config, log_prob_program, make_batch, make_engine, worker_config
from fixtures.fake_quant import mxfp8_round_trip
from fixtures.lora_cases import (
    LIMITS,
    encoded_lora_program,
    lora_program,
    reference_program,
    rejected_load_program,
)
from fixtures.ranks import run_ranks
from fixtures.tiny import write_tiny_model
from verl.trainer.ppo.batching import split_mini_batches

LORA = {"lora_rank": 4, "lora_alpha": 12}
Q_PROJ = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models with 127 tokens and 6 rows per key projection: two ranks hold different numbers of rows."""
    root = tmp_path_factory.mktemp("models")
    common = dict(vocab_size=127, num_key_value_heads=1, head_dim=6, num_attention_heads=4)
    return {
        "qwen3": str(write_tiny_model(root / "qwen3", **common)),
        "untied": str(write_tiny_model(root / "untied", tied=False, **common)),
        "qwen3_moe": str(write_tiny_model(root / "moe", kind="qwen3_moe", **common)),
        "bfloat16": str(write_tiny_model(root / "bfloat16", dtype="bfloat16", **common)),
    }


@pytest.fixture(scope="module")
def actor():
    return actor_config()


def shards_of(ranks, part=slice(None)):
    return [rank[part] for rank in split_mini_batches(make_batch(8), 4, ranks)]


def run(ranks, model, actor, options=LORA, part=slice(None), **keywords):
    """Run `lora_program` on each rank, check that all export the same weights, and return rank 0's result."""
    program = functools.partial(lora_program, **keywords)
    first, *others = run_ranks(ranks, program, model, shards_of(ranks, part), actor, options)
    for other in others:
        assert all(torch.equal(other["exported"][name], tensor) for name, tensor in first["exported"].items())
    return first


def merged_by_peft(model, adapter, to):
    """Return the checkpoint weights after peft's `merge_and_unload` of an adapter directory."""
    base = AutoModelForCausalLM.from_pretrained(model)
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(to)
    return load_file(to / "model.safetensors")


def assert_near(found, expected, atol=1e-6):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype, name
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol, msg=name)


# ---- training and export --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options", "ranks"),
    [
        ("qwen3", {}, 1),
        ("qwen3", {}, 2),
        ("qwen3_moe", {}, 2),
        ("untied", {"target_modules": ["q_proj", "lm_head"], "enable_gradient_checkpointing": True}, 2),
        ("qwen3", {"target_modules": r".*\.1\..*(q|k)_proj"}, 1),
        ("qwen3", {"exclude_modules": ["down_proj", "layers.0.mlp.up_proj"]}, 2),
    ],
)
def test_exported_weights_equal_those_merged_by_peft(tmp_path, models, actor, model, options, ranks):
    data, checkpoint = make_batch(), tmp_path / "checkpoint"
    keywords = {"save": str(checkpoint), "hf": str(tmp_path / "hf"), "ask": data}
    result = run(ranks, models[model], actor, LORA | options, **keywords)
    base = load_file(f"{models[model]}/model.safetensors")
    # B starts at zero.
    assert set(result["exported_before"]) == set(base)
    assert all(torch.equal(result["exported_before"][name], tensor) for name, tensor in base.items())

    expected = merged_by_peft(models[model], checkpoint / "lora_adapter", tmp_path / "merged")
    assert_near(result["exported"], expected)
    assert_near(load_file(tmp_path / "hf" / "model.safetensors"), expected)
    adapted = {name.split(".lora_")[0] + ".weight" for name in result["trained"]}
    for name, tensor in base.items():
        assert torch.equal(result["exported"][name], tensor) == (name not in adapted), name
    assert max((result["exported"][name] - base[name]).abs().max() for name in adapted) > 5e-4

    # The engine computes with the same policy.
    [(log_probs, _)] = run_ranks(1, log_prob_program, str(tmp_path / "hf"), [data], LIMITS, {})
    torch.testing.assert_close(result["log_probs"], log_probs, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("model", "ranks"), [("qwen3", 1), ("qwen3_moe", 2)])
def test_a_step_changes_only_adapters(models, actor, model, ranks):
    result = run(ranks, models[model], actor)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj"]
    if model == "qwen3":
        layers += ["gate_proj", "up_proj", "down_proj"]
    assert len(result["trained"]) == result["optimized"] == 2 * 2 * len(layers)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in result["trained"]} == set(layers)
    for name, before in result["before"].items():
        assert torch.equal(before, result["after"][name]) == (name not in result["trained"]), name


def test_gradient_checkpointing_does_not_change_the_gradient(models, actor):
    plain, recomputed = (
        run(1, models["qwen3"], actor, LORA | {"enable_gradient_checkpointing": on})["history"] for on in (False, True)
    )
    for a, b in zip(plain, recomputed, strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5) and a["grad_norm"] > 0


def test_initial_values_depend_only_on_the_seed(models, actor):
    """A has peft's distribution, B is zero, on any number of ranks."""
    one, two, other = (
        run(ranks, models["qwen3"], actor, part=slice(0), seed=seed)["after"]
        for ranks, seed in ((1, 3), (2, 3), (1, 4))
    )
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name])
        assert tensor.dtype == torch.float32
        if "lora_A" in name:
            assert not torch.equal(tensor, other[name])
            # uniform with variance 1 / (3 in)
            bound = tensor.shape[1] ** -0.5
            assert 0.9 * bound < tensor.abs().max() <= bound
            assert tensor.var().item() == pytest.approx(bound**2 / 3, rel=0.25)
        elif "lora_B" in name:
            assert not tensor.any()
    drawn = [tensor[:, :24].flatten()[:24] for name, tensor in one.items() if "lora_A" in name]
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


@pytest.mark.parametrize("ranks", [1, 2])
def test_adapters_are_float32_on_a_bfloat16_model(models, ranks):
    actor = actor_config(fsdp_config=fsdp_config(model_dtype="bf16", dtype="bfloat16"))
    result = run(ranks, models["bfloat16"], actor)
    for name, dtype in result["dtypes"].items():
        assert dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name
    base = load_file(f"{models['bfloat16']}/model.safetensors")
    for name, tensor in result["exported"].items():
        assert tensor.dtype == torch.bfloat16
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.default.weight" in result["after"]:
            a, b = (result["after"][f"{module}.lora_{part}.default.weight"].double() for part in "AB")
            expected = (base[name].double() + 3.0 * b @ a).bfloat16()
            # Rounded once: float32 and float64 may round a tie to different neighbors.
            assert ((tensor != expected).float().mean() < 1e-3) and not torch.equal(tensor, base[name])
            torch.testing.assert_close(tensor, expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize(("model", "ranks"), [("qwen3", 1), ("qwen3", 2), ("qwen3_moe", 2)])
def test_each_rank_encodes_the_merged_rows_that_it_holds(models, actor, model, ranks):
    names = {f"{Q_PROJ}.weight", "model.layers.0.self_attn.k_proj.weight", "model.embed_tokens.weight"}
    shards = shards_of(ranks)
    outcomes = run_ranks(ranks, encoded_lora_program, models[model], shards, actor, LORA, names)
    plain = outcomes[0][0]
    for _, encoded, parts, _ in outcomes:
        assert [name for name, _ in parts] == [name for name in plain if name in names]
        for name in names:
            assert torch.equal(encoded[name].view(torch.uint8), plain[name].to(torch.float8_e4m3fn).view(torch.uint8))
            assert torch.equal(encoded[f"{name}_sum"], plain[name].sum(-1, keepdim=True))
    for name in names:
        assert sum(dict(parts)[name][0] for _, _, parts, _ in outcomes) == plain[name].shape[0]
    sent = outcomes[0][3]
    assert f"{Q_PROJ}.weight_scale" in sent
    for name, tensor in plain.items():
        if f"{name}_scale" in sent:
            scale = torch.exp2(sent[f"{name}_scale"].double() - 127).repeat_interleave(32, -1)
            assert torch.equal(sent[name].double() * scale[:, : tensor.shape[-1]], mxfp8_round_trip(tensor).double())
        else:
            assert torch.equal(sent[name], tensor)


def test_the_reference_policy_has_no_adapters(tmp_path, models):
    """It has no adapter even if the policy starts from one."""
    adapter = write_with_peft(models["qwen3"], tmp_path / "adapter")
    config = worker_config(models["qwen3"])
    config = replace(config, model=replace(config.model, lora_adapter_path=str(adapter)))
    data = make_batch(8)
    [(before, reference, after)] = run_ranks(1, reference_program, config, [data], split_mini_batches(data, 4, 1))
    [(plain, _)] = run_ranks(1, log_prob_program, models["qwen3"], [data], LIMITS, {})
    assert torch.equal(reference, plain)
    assert (before - plain).abs().max() > 0.1
    assert (after - before).abs().max() > 1e-4


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_run_bit_for_bit(tmp_path, models, actor, ranks):
    path = str(tmp_path / "checkpoint")
    begun = run(ranks, models["qwen3"], actor, part=slice(1), save=path)
    # Another seed, so that the initial adapters differ from those in the checkpoint.
    resumed = run(ranks, models["qwen3"], actor, part=slice(1, None), load=path, seed=9)
    straight = run(ranks, models["qwen3"], actor)
    assert begun["history"] + resumed["history"] == straight["history"]
    assert all(torch.equal(resumed["after"][name], tensor) for name, tensor in straight["after"].items())


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_checkpoint_loads_with_another_number_of_ranks(tmp_path, models, actor, before, after):
    path = str(tmp_path / "checkpoint")
    saved = run(before, models["qwen3"], actor, part=slice(1), save=path)
    resumed = run(after, models["qwen3"], actor, part=slice(1, None), load=path, seed=9)
    assert all(torch.equal(resumed["before"][name], tensor) for name, tensor in saved["after"].items())
    straight = run(1, models["qwen3"], actor)
    for metrics, expected in zip(resumed["history"], straight["history"][1:], strict=True):
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("ranks", [2])
def test_files_of_a_checkpoint(tmp_path, models, actor, ranks):
    path = tmp_path / "checkpoint"
    result = run(ranks, models["qwen3"], actor, save=str(path))
    saved = torch.distributed.checkpoint.FileSystemReader(str(path / "model")).read_metadata().state_dict_metadata
    assert set(saved) == result["trained"]
    config = json.loads((path / "lora_adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 12)
    assert config["base_model_name_or_path"] == models["qwen3"]
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    tensors = load_file(path / "lora_adapter" / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model.").replace(".weight", ".default.weight") for name in tensors} == result[
        "trained"
    ]
    for name, tensor in tensors.items():
        ours = result["after"][name.removeprefix("base_model.model.").replace(".weight", ".default.weight")]
        assert torch.equal(tensor, ours)


@pytest.mark.parametrize("model", ["qwen3_moe"])
def test_peft_computes_the_same_logits_with_the_saved_adapter(tmp_path, models, actor, model):
    run(2, models[model], actor, save=str(tmp_path / "c"), hf=str(tmp_path / "hf"))
    base = AutoModelForCausalLM.from_pretrained(models[model])
    adapted = PeftModel.from_pretrained(base, tmp_path / "c" / "lora_adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.arange(4, 40).view(2, 18)
    with torch.no_grad(), adapted.disable_adapter():
        plain = adapted(input_ids=ids).logits
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=0, atol=2e-5)
        assert (adapted(input_ids=ids).logits - plain).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("saved", "loaded", "text"),
    [
        (LORA, LORA | {"lora_rank": 2}, "lora_rank=2: .*was saved with 4; set lora_rank=4"),
        (LORA, LORA | {"lora_alpha": 16}, "lora_alpha=16: .*was saved with 12; set lora_alpha=12"),
        (LORA, LORA | {"target_modules": ["q_proj"]}, "has shape .* in the checkpoint and none in the model"),
        (LORA, {}, "belongs to another model: .*lora_rank and target_modules that it was saved with"),
        ({}, LORA, "belongs to another model"),
    ],
)
def test_a_checkpoint_with_other_adapters_is_rejected(tmp_path, models, saved, loaded, text):
    [error] = run_ranks(1, rejected_load_program, models["qwen3"], saved, loaded, str(tmp_path / "c"))
    assert re.search(text, error), error


# ---- an adapter to start from ---------------------------------------------------------------------------------------


def write_with_peft(model, path, **over):
    """Write an adapter with peft, with random B."""
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], **over})
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("over", "ranks"),
    [
        ({"use_rslora": True, "lora_dropout": 0.5}, 2),
        ({"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 9}}, 2),
        ({"layers_to_transform": [1]}, 1),
        ({"target_modules": r".*0\..*proj"}, 2),
    ],
)
def test_starting_from_an_adapter_saved_by_peft(tmp_path, models, actor, over, ranks):
    adapter = write_with_peft(models["qwen3"], tmp_path / "adapter", **over)
    options = {"lora_adapter_path": str(adapter)}
    result = run(ranks, models["qwen3"], actor, options, save=str(tmp_path / "c"))
    expected = merged_by_peft(models["qwen3"], adapter, tmp_path / "merged")
    assert_near(result["exported_before"], expected)
    assert_near(
        result["exported"], merged_by_peft(models["qwen3"], tmp_path / "c" / "lora_adapter", tmp_path / "after")
    )
    # The adapter's dropout is not applied: the trained policy is the policy that sampled.
    again = run(ranks, models["qwen3"], actor, options, seed=9)
    assert again["history"] == result["history"]


def test_starting_from_the_adapter_of_an_earlier_run(tmp_path, models, actor):
    first = run(2, models["qwen3_moe"], actor, save=str(tmp_path / "c"))
    path = tmp_path / "c" / "lora_adapter"
    second = run(1, models["qwen3_moe"], actor, LORA | {"lora_adapter_path": str(path)}, part=slice(0))
    assert_near(second["exported"], first["exported"])


def test_an_adapter_of_another_model_is_rejected(tmp_path, models):
    adapter = write_with_peft(models["qwen3"], tmp_path / "adapter")
    bigger = write_tiny_model(tmp_path / "bigger", hidden_size=32)

    def program(rank):
        with pytest.raises(ValueError, match=r"lora_adapter_path=.*q_proj has shape .*expected shape"):
            make_engine(bigger, lora_adapter_path=str(adapter))
        weights = load_file(adapter / "adapter_model.safetensors")
        dropped = {name: tensor for name, tensor in weights.items() if "layers.1" not in name}
        save_file(dropped, adapter / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=r"lora_A of model\.layers\.1\.self_attn\.q_proj is missing"):
            make_engine(models["qwen3"], lora_adapter_path=str(adapter))
        save_file(weights | {"base_model.model.x.lora_A.weight": torch.zeros(1)}, adapter / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=r"base_model\.model\.x\.lora_A\.weight does not belong to any layer"):
            make_engine(models["qwen3"], lora_adapter_path=str(adapter))

    run_ranks(1, program)
