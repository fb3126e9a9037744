"""Checks of `rollout.quantization` against checkpoint and machine, before any process starts."""

import json
import subprocess
import sys
from importlib import metadata

import pytest

from verl.preflight.checks.quantization import check_quantization
from verl.preflight.findings import Findings

FIELD = "actor_rollout_ref__rollout__quantization"
FILE = "actor_rollout_ref__rollout__quantization_config_file"
SIZES = {"hidden": 64, "inner": 96}


@pytest.fixture
def decoder(run_files):
    """Write a decoder of two layers as the checkpoint of the run; call it for more tensors or config keys."""

    def write(extra=(), **config):
        hidden, inner = SIZES["hidden"], SIZES["inner"]
        tensors = {"model.embed_tokens.weight": (32, hidden), "model.norm.weight": (hidden,)}
        for layer in range(2):
            prefix = f"model.layers.{layer}"
            tensors |= {f"{prefix}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
            tensors |= {f"{prefix}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
            tensors[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)
        run_files.write_safetensors(run_files.weights, tensors | dict(extra))
        path = run_files.model / "config.json"
        sizes = {"hidden_size": hidden, "intermediate_size": inner}
        path.write_text(json.dumps(json.loads(path.read_text()) | sizes | config))

    write()
    return write


def test_plan_shows_the_weights_of_the_engine(decoder, plan_of):
    plain, quantized = plan_of(), plan_of(**{FIELD: "ascend"})
    assert plain.rollout_weights is None
    assert quantized.rollout_weights.startswith("MXFP8: 14 of 17 weights")
    assert quantized.update_bytes < plain.update_bytes
    assert "engine's weights" in quantized.render() and "engine's weights" not in plain.render()
    received = plan_of(**{FIELD: "ascend", f"{FIELD}_side": "receiver"})
    assert received.update_bytes == plain.update_bytes


def test_ignored_layers_are_not_counted(decoder, plan_of, tmp_path):
    ignore = tmp_path / "ignore.json"
    ignore.write_text('{"ignore": ["re:.*o_proj"]}')
    assert plan_of(**{FIELD: "ascend", FILE: ignore}).rollout_weights.startswith("MXFP8: 12 of 17 weights")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        ('{"ignore": [', "damaged JSON"),
        ('{"ignore": ["model.layers.7.mlp.up_proj"]}', "matches no layer"),
        ('{"model.layers.9.mlp.up_proj.weight": "W8A8_MXFP8"}', "describes another model"),
        ('{"model.layers.0.mlp.up_proj.weight": "W8A8_DYNAMIC"}', "only W8A8_MXFP8, W4A8_MXFP and FLOAT"),
    ],
)
def test_description_that_does_not_fit_is_rejected(decoder, problem_of, tmp_path, content, words):
    file = tmp_path / "description.json"
    if content is not None:
        file.write_text(content)
    problem = problem_of(**{FIELD: "ascend", FILE: file})
    assert str(file) in problem or words == "matches no layer"
    assert words in problem and problem.startswith("actor_rollout_ref.rollout.quantization")


def test_quantized_checkpoint_is_rejected(decoder, problem_of):
    decoder(quantization_config={"quant_method": "fp8"})
    assert "already quantized" in problem_of(**{FIELD: "ascend"})


def test_tensor_parallel_cut_inside_a_block_is_rejected(decoder, problem_of):
    changes = {"actor_rollout_ref__rollout__tensor_model_parallel_size": 2, "trainer__n_gpus_per_node": 2}
    problem = problem_of(**{FIELD: "ascend", **changes})
    assert "model.layers.0.mlp.down_proj [64, 96]" in problem and "tensor_model_parallel_size=1" in problem


def test_unused_file_and_side_are_noted(decoder, plan_of, tmp_path):
    notes = plan_of(**{FILE: tmp_path / "x.json", f"{FIELD}_side": "receiver"}).notes
    note = next(note for note in notes if "rollout.quantization=null" in note)
    assert "quantization_config_file" in note and "quantization_side" in note


def test_self_test_of_an_unquantized_engine_is_rejected(decoder, problem_of):
    problem = problem_of(**{f"{FIELD}_self_test": True})
    assert problem.startswith(
        "actor_rollout_ref.rollout.quantization_self_test=True: quantization=null has no self-test"
    )


def problems_on(device, run_files, value="ascend"):
    from verl.config import load_config

    found = Findings()
    check_quantization(load_config(run_files.overrides(**{FIELD: value})), device, found)
    return found.errors


def test_description_in_an_unquantized_model_is_rejected_on_npu(decoder, run_files):
    """vllm-ascend detects it by itself if no quantization is set."""
    assert problems_on("npu", run_files, "null") == []
    (run_files.model / "quant_model_description.json").write_text("{}")
    [problem] = problems_on("npu", run_files, "null")
    assert "quantization=null" in problem and "quant_model_description.json" in problem
    assert problems_on("cpu", run_files, "null") == []


def test_ascend_on_cuda_is_rejected(decoder, run_files):
    [problem] = problems_on("cuda", run_files)
    assert "quantization=ascend" in problem and "use fp8 there" in problem


def test_ascend_on_an_npu_needs_vllm_ascend(decoder, run_files):
    [problem] = problems_on("npu", run_files)
    assert "vllm-ascend is not installed" in problem and "0.18.0 or newer" in problem


@pytest.mark.parametrize(
    ("version", "built_for", "words"),
    [("0.17.0", "A5", "0.17.0 is too old; install 0.18.0"), ("0.23.0", "A2", "built for device type A2")],
)
def test_ascend_on_an_npu_needs_a_matching_vllm_ascend(
    decoder, run_files, monkeypatch, tmp_path, version, built_for, words
):
    package = tmp_path / "site" / "vllm_ascend"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "_build_info.py").write_text(f"__device_type__ = {built_for!r}\n")
    info = tmp_path / "site" / f"vllm_ascend-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm-ascend\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(package.parent))
    assert metadata.version("vllm-ascend") == version
    [problem] = problems_on("npu", run_files)
    assert words in problem
    for name in ("vllm_ascend", "vllm_ascend._build_info"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("value", ["mxfp8", "Ascend", "int4"])
def test_command_line_rejects_unknown_values_before_a_process_starts(decoder, run_files, value):
    overrides = run_files.overrides(**{FIELD: value})
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert f"rollout.quantization={value}" in done.stderr and "fp8, torchao, ascend, null" in done.stderr
    assert "Traceback" not in done.stderr and not run_files.out.exists()


def test_update_bytes_of_mxfp8(decoder, plan_of):
    """1 byte per weight and 1 per 32 of them, bfloat16 for others and biases, float32 for biases of routers."""
    extra = {"model.layers.0.self_attn.q_proj.bias": (256,), "model.layers.1.mlp.gate.e_score_correction_bias": (8,)}
    keys = {FIELD: "ascend", "actor_rollout_ref__rollout__dtype": "bfloat16"}
    without = plan_of(**keys).update_bytes
    hidden, inner = SIZES["hidden"], SIZES["inner"]
    elements = 2 * (4 * hidden * hidden + 3 * hidden * inner)
    assert without == elements * 33 // 32 + 2 * (32 * hidden + hidden)
    decoder(extra)
    assert plan_of(**keys).update_bytes == without + 2 * 256 + 4 * 8


def test_update_bytes_of_fp8(examine_on):
    """1 byte per weight of a projection, a float32 scale for 128 x 128 of them, bfloat16 for all other weights."""
    keys = {"actor_rollout_ref.rollout.quantization": "fp8", "trainer.device": "cuda"}
    plan, _ = examine_on("Qwen3-8B", keys, "cuda:h200")
    hidden, width, layers, kv, words = 4096, 12288, 36, 1024, 151936
    elements = layers * hidden * (2 * hidden + 2 * kv + 3 * width)
    plain = 2 * words * hidden + layers * (2 * hidden + 256) + hidden
    assert plan.update_bytes == elements + 4 * elements // (128 * 128) + 2 * plain
    keys["actor_rollout_ref.rollout.quantization_side"] = "receiver"
    assert examine_on("Qwen3-8B", keys, "cuda:h200")[0].update_bytes == 2 * (elements + plain)


@pytest.mark.parametrize(("tp", "fits"), [(4, True), (8, False)])
def test_experts_need_pairs_of_blocks_on_each_rank(examine_on, tp, fits):
    """768 inputs of an expert: 192 on each of 4 ranks, 96 on each of 8, which no known vllm-ascend pairs."""
    _, found = examine_on("Qwen3-30B-A3B", {"actor_rollout_ref.rollout.tensor_model_parallel_size": tp})
    about = [text for text in found.errors if "96 inputs on a rank" in text and "quantization_config_file" in text]
    assert bool(about) is not fits


SCHEME = f"{FIELD}_scheme"


@pytest.fixture
def fitting(decoder, monkeypatch):
    """The decoder with inputs that are multiples of 64."""
    monkeypatch.setitem(SIZES, "inner", 128)
    decoder()


def test_plan_of_mxfp4(fitting, plan_of):
    """Half a byte per weight and 1 byte per 32 of them, bfloat16 for others; the plan names the format."""
    keys = {FIELD: "ascend", SCHEME: "W4A8_MXFP", "actor_rollout_ref__rollout__dtype": "bfloat16"}
    plan = plan_of(**keys)
    assert plan.rollout_weights.startswith("MXFP4: 14 of 17 weights")
    hidden, inner = SIZES["hidden"], SIZES["inner"]
    elements = 2 * (4 * hidden * hidden + 3 * hidden * inner)
    assert plan.update_bytes == elements * 17 // 32 + 2 * (32 * hidden + hidden)
    eight = plan_of(**{**keys, SCHEME: "W8A8_MXFP8"})
    assert eight.rollout_weights.startswith("MXFP8") and eight.memory.replica_bytes > plan.memory.replica_bytes


@pytest.mark.parametrize("value", ["fp8", "null"])
def test_scheme_of_another_quantization_is_rejected(fitting, problem_of, value):
    problem = problem_of(**{FIELD: value, SCHEME: "W4A8_MXFP"})
    assert f"quantization_scheme=W4A8_MXFP: actor_rollout_ref.rollout.quantization={value} has no schemes" in problem


def test_scheme_beside_a_file_is_rejected(fitting, problem_of, tmp_path):
    file = tmp_path / "ignore.json"
    file.write_text('{"ignore": []}')
    problem = problem_of(**{FIELD: "ascend", SCHEME: "W4A8_MXFP", FILE: file})
    assert f"quantization_config_file={file} describes the layers one by one; remove one of the two" in problem


def test_unknown_scheme_is_rejected(fitting, problem_of):
    problem = problem_of(**{FIELD: "ascend", SCHEME: "W4A4_MXFP4"})
    assert "rollout.quantization_scheme=W4A4_MXFP4" in problem and "W8A8_MXFP8, W4A8_MXFP, null" in problem


def test_inputs_that_are_no_multiple_of_64_are_rejected(decoder, problem_of):
    problem = problem_of(**{FIELD: "ascend", SCHEME: "W4A8_MXFP"})
    assert "model.layers.0.mlp.down_proj [64, 96] has 96 inputs on a rank" in problem
    assert "W4A8_MXFP takes multiples of 64 only" in problem and "verl describe" in problem


def test_host_memory_of_mxfp4_on_an_npu(examine_on):
    """The engine keeps half a byte per weight for updates."""
    keys = {"actor_rollout_ref.rollout.tensor_model_parallel_size": 1}
    eight, _ = examine_on("Qwen3-8B", keys)
    four, _ = examine_on("Qwen3-8B", {**keys, "actor_rollout_ref.rollout.quantization_scheme": "W4A8_MXFP"})
    hidden, width, layers, kv, words = 4096, 12288, 36, 1024, 151936
    parameters = layers * hidden * (2 * hidden + 2 * kv + 3 * width) + 2 * words * hidden
    parameters += layers * (2 * hidden + 256) + hidden
    assert four.memory.replica_bytes - eight.memory.replica_bytes == parameters // 2
    assert four.update_bytes < 0.7 * eight.update_bytes
