import json
import struct

import pytest

PATH = "actor_rollout_ref.model.path="


def rewrite_config(run_files, **changes):
    path = run_files.model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_missing_directory_is_an_error(problem_of, run_files):
    assert "does not exist" in problem_of(actor_rollout_ref__model__path=run_files.root / "none")
    assert "is a file" in problem_of(actor_rollout_ref__model__path=run_files.reward)


def test_a_missing_config_is_an_error(problem_of, run_files):
    (run_files.model / "config.json").unlink()
    text = problem_of()
    assert text.startswith(PATH + str(run_files.model)) and "has no config.json" in text


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_config_is_an_error(problem_of, run_files, content):
    (run_files.model / "config.json").write_text(content)
    assert "config.json" in problem_of()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"vision_config": {"depth": 2}, "text_config": {}}, "multi-modal model (vision_config"),
        ({"audio_config": {}}, "multi-modal model (audio_config"),
        ({"model_type": "gpt_oss"}, "gpt_oss is not supported"),
        ({"model_type": "kimi_k2", "auto_map": {}}, "set actor_rollout_ref.model.trust_remote_code=True"),
        ({"model_type": "phi"}, "phi is not supported"),
        ({"model_type": "phimoe"}, "phimoe is not supported"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "latent attention (kv_lora_rank in its config.json)"),
    ],
)
def test_an_architecture_that_cannot_be_trained_is_an_error(problem_of, run_files, fields, words):
    rewrite_config(run_files, **fields)
    text = problem_of()
    assert text.startswith(PATH + str(run_files.model)) and words in text


def test_missing_weights_are_an_error(problem_of, run_files):
    run_files.weights.unlink()
    text = problem_of()
    assert text.startswith(PATH + str(run_files.model)) and "has no weights" in text


@pytest.mark.parametrize(("vocabulary", "works"), [(None, False), ("tiktoken.model", True), ("tekken.json", True)])
def test_settings_alone_are_no_tokenizer(problems_of, plan_of, run_files, vocabulary, works):
    (run_files.model / "tokenizer.json").unlink()
    (run_files.model / "tokenizer_config.json").write_text("{}")
    if vocabulary is not None:
        (run_files.model / vocabulary).write_text("")
    if works:
        plan_of()
    else:
        assert any("no tokenizer found (none of tokenizer.json" in text for text in problems_of())


def test_a_missing_tokenizer_is_an_error(problem_of, plan_of, run_files):
    (run_files.model / "tokenizer.json").unlink()
    assert "no tokenizer" in problem_of()
    other = run_files.root / "tokenizer"
    other.mkdir()
    (other / "tokenizer.json").write_text("{}")
    plan_of(actor_rollout_ref__model__tokenizer_path=other)


def test_weights_of_the_wrong_length_are_an_error(problem_of, run_files):
    whole = run_files.weights.read_bytes()
    for content, word in (
        (whole[:-4], "truncated"),
        (whole[:4], "too few"),
        (whole[:40], "header"),
        (whole + b"1", "longer"),
    ):
        run_files.weights.write_bytes(content)
        text = problem_of()
        assert "model.safetensors is damaged" in text and word in text


def test_an_invalid_header_is_an_error(problem_of, run_files):
    whole = run_files.weights.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = whole[8 : 8 + length]
    for old, new in ((b'"F32"', b'"F16"'), (b'"F32"', b'"Q99"'), (b"{", b"("), (b"[32, 16]", b"[32, 17]")):
        run_files.weights.write_bytes(whole[:8] + header.replace(old, new) + whole[8 + length :])
        assert "model.safetensors is damaged" in problem_of(), (old, new)


def test_parameters_and_errors_of_sharded_weights(plan_of, problem_of, run_files):
    run_files.weights.unlink()
    shards = {
        "model-00001-of-00002.safetensors": {"a": (4, 5)},
        "model-00002-of-00002.safetensors": {"b": (3,), "c": (2, 2)},
    }
    for name, tensors in shards.items():
        run_files.write_safetensors(run_files.model / name, tensors)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    index = run_files.model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert plan_of().parameters == 20 + 3 + 4
    index.write_text(json.dumps({"weight_map": weight_map | {"d": "model-00002-of-00002.safetensors"}}))
    assert "model-00002-of-00002.safetensors lacks d" in problem_of()
    index.write_text(json.dumps({"weight_map": weight_map}))
    (run_files.model / "model-00001-of-00002.safetensors").unlink()
    assert "model-00001-of-00002.safetensors is missing" in problem_of()


def test_pickled_weights_have_no_known_size(plan_of, problem_of, run_files):
    import zipfile

    run_files.weights.unlink()
    path = run_files.model / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"x" * 1000)
    plan = plan_of()
    assert plan.parameters is None and plan.memory is None and "unknown" in plan.render()
    path.write_bytes(path.read_bytes()[:500])
    assert "pytorch_model.bin is damaged or truncated" in problem_of()


def test_lengths_beyond_the_models_positions_are_errors(problem_of, plan_of, run_files):
    text = problem_of(data__max_response_length=49)
    assert "65 tokens" in text and "64 positions" in text and "data.max_response_length=49" in text
    plan_of(data__max_response_length=48)
    assert "max_model_len=128" in problem_of(actor_rollout_ref__rollout__max_model_len=128)
    text = problem_of(actor_rollout_ref__rollout__max_model_len=31)
    assert "max_model_len=31" in text and "32" in text
    rewrite_config(run_files, rope_scaling={"rope_type": "linear", "factor": 4.0})
    plan_of(data__max_response_length=49)


@pytest.mark.parametrize(("size", "ok"), [(1, True), (2, True), (4, True), (3, False), (8, False)])
def test_tensor_parallelism_must_fit_the_heads(problem_of, plan_of, size, ok):
    # 4 heads, 2 key-value heads, of which 4 devices would hold copies
    changes = {
        "actor_rollout_ref__rollout__tensor_model_parallel_size": size,
        "actor_rollout_ref__rollout__nnodes": 1,
        "actor_rollout_ref__rollout__n_gpus_per_node": 24,
    }
    if ok:
        assert plan_of(**changes).replicas == 24 // size
    else:
        assert "use one of 1, 2, 4" in problem_of(**changes)


def test_the_text_part_of_a_multimodal_config_is_used(plan_of, problem_of, run_files):
    config = json.loads((run_files.model / "config.json").read_text())
    (run_files.model / "config.json").write_text(json.dumps({"model_type": "outer", "text_config": config}))
    plan_of()
    assert "64 positions" in problem_of(data__max_response_length=49)


@pytest.mark.parametrize("section", ["actor_rollout_ref.model", "critic.model"])
@pytest.mark.parametrize(
    ("field", "way_out"),
    [
        ("dtype: float16", "fsdp_config"),
        ("torch_dtype: float16", "fsdp_config"),
        ("quantization_config: {quant_method: fp8}", "rollout.quantization"),
        ("architectures: [Other]", "checkpoint of that architecture"),
        ("model_type: other", "checkpoint of that architecture"),
    ],
)
def test_fields_that_other_keys_set_cannot_be_overridden(problem_of, run_files, section, field, way_out):
    changes = {f"{section}.override_config".replace(".", "__"): f"{{{field}}}"}
    if section == "critic.model":
        changes |= {"algorithm__adv_estimator": "gae", "critic__model__path": run_files.model}
    text = problem_of(**changes)
    assert text.startswith(f"{section}.override_config.{field.partition(':')[0]}=") and way_out in text, text


def test_sizes_of_the_plan_are_those_of_the_overridden_config(plan_of, problem_of):
    override = "actor_rollout_ref__model__override_config"
    assert plan_of(**{override: "{max_position_embeddings: 32}"})
    text = problem_of(**{override: "{max_position_embeddings: 31}"})
    assert "32 tokens, but the model has 31 positions" in text


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("Qwen2.5-VL-7B-Instruct", True),
        ("Qwen3-Omni-30B-A3B", True),
        ("GLM-4.1V-9B-Thinking", True),
        ("MiniCPM-o-2_6", True),
        ("Qwen3.5-27B", True),
        ("Qwen3-8B", False),
        ("GLM-4.5-Air", False),
        ("MiniCPM4-8B", False),
    ],
)
def test_a_multi_modal_model_is_known_by_name_without_its_files(name, refused):
    from verl.config import load_config
    from verl.preflight.check import examine
    from verl.preflight.target import Hardware, Target

    config = load_config([f"actor_rollout_ref.model.path=/nowhere/{name}"])
    target = Target(starting=False, hardware=Hardware("cuda:h100"), without_files=True)
    errors = examine(config, target)[1].errors
    assert any("has the name of a multi-modal model" in text for text in errors) is refused, errors
