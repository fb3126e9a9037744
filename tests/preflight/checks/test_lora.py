import json

import pytest

M = "actor_rollout_ref__model__"
LAYERS = {
    "model.embed_tokens.weight": (32, 16),
    "model.layers.0.self_attn.q_proj.weight": (32, 16),
    "model.layers.0.self_attn.o_proj.weight": (16, 32),
    "model.layers.0.mlp.up_proj.weight": (32, 16),
    "model.layers.0.input_layernorm.weight": (16,),
    "lm_head.weight": (32, 16),
}


@pytest.fixture
def layers(run_files):
    """A checkpoint whose tensors have the names of a model's."""
    run_files.write_safetensors(run_files.weights, LAYERS)


@pytest.fixture
def adapter(run_files):
    """Writes an adapter of rank 4; `over` replaces fields of its config, None leaves one out."""

    def write(**over):
        path = run_files.root / "adapter"
        path.mkdir(exist_ok=True)
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "o_proj"]} | over
        config = {name: value for name, value in config.items() if value is not None}
        (path / "adapter_config.json").write_text(json.dumps(config))
        run_files.write_safetensors(path / "adapter_model.safetensors", {"a": (4, 16)})
        return path

    return write


def with_adapter(path, **changes):
    return {M + "lora_adapter_path": path} | {M + name: value for name, value in changes.items()}


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"lora_rank": -1}, "lora_rank=-1: has to be at least 0"),
        ({"lora_rank": 4, "lora_alpha": 0}, "lora_alpha=0: has to be above 0"),
        ({"lora_rank": 4, "lora_alpha": -2}, "lora_alpha=-2: has to be above 0"),
        ({"target_modules": "[q_proj]"}, "target_modules=[q_proj]: there are no adapters with"),
        ({"exclude_modules": "[q_proj]"}, "exclude_modules=[q_proj]: there are no adapters with"),
        ({"lora_rank": 4, "target_modules": "[]"}, "target_modules=[]: no layer would be trained; use all-linear"),
        ({"lora_rank": 4, "target_modules": "[qproj]"}, "target_modules: the model has no qproj; near it are q_proj"),
        (
            {"lora_rank": 4, "target_modules": "[zzz]"},
            "no zzz; near it are embed_tokens, lm_head, o_proj, q_proj, up_proj",
        ),
        (
            {"lora_rank": 4, "target_modules": "[mlp.q_proj]"},
            "target_modules: the model has no mlp.q_proj; near it are",
        ),
        ({"lora_rank": 4, "target_modules": "'.*(v|k)_proj'"}, "which no layer has; names are such as model.layers.0"),
        ({"lora_rank": 4, "exclude_modules": "[qproj]"}, "exclude_modules: the model has no qproj; near it are q_proj"),
        ({"lora_rank": 4, "exclude_modules": "'.*zzz'"}, "exclude_modules=.*zzz: is a regular expression"),
        ({"lora_rank": 4, "exclude_modules": "'.*_proj'"}, "exclude_modules=.*_proj: leaves no layer of"),
        (
            {"lora_rank": 4, "target_modules": "[q_proj]", "exclude_modules": "[self_attn.q_proj]"},
            "exclude_modules=[self_attn.q_proj]: leaves no layer of actor_rollout_ref.model.target_modules=[q_proj]",
        ),
        ({"lora_rank": 4, "target_modules": "q_proj"}, "use [q_proj]"),
        ({"lora_rank": 4, "target_modules": "'q_(proj'"}, "is no regular expression (missing ), unterminated"),
        ({"lora_rank": 4, "target_parameters": "[gate_up_proj]"}, "target_parameters=[gate_up_proj] is not supported"),
        ({"lora__rank": 4}, "set actor_rollout_ref.model.lora_rank"),
        ({"lora__merge": False}, "use True: adapters apart from the weights"),
    ],
)
def test_keys_that_cannot_work(problem_of, changes, text):
    assert text in problem_of(**{M + name: value for name, value in changes.items()})


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize(
    "changes",
    [
        {"lora_rank": 4},
        {"lora_rank": 4, "lora_alpha": 32, "target_modules": "[q_proj,self_attn.o_proj]", "exclude_modules": "[mlp]"},
        {"lora_rank": 4, "target_modules": "'layers.0.*q_proj'", "exclude_modules": "[layers.0.self_attn.o_proj]"},
        {"lora_rank": 4, "target_modules": "'.*(q|o)_proj'", "lora__merge": True},
        {"lora_rank": 0, "lora_alpha": 16, "target_modules": "all-linear", "exclude_modules": "null"},
    ],
)
def test_keys_that_work(plan_of, changes):
    plan_of(**{M + name: value for name, value in changes.items()})


def test_an_experts_model_may_have_other_names_than_its_checkpoint(plan_of, run_files):
    run_files.write_safetensors(run_files.weights, {"model.layers.0.mlp.experts.0.w1.weight": (8, 16)})
    plan_of(**{M + "lora_rank": 4, M + "target_modules": "[q_proj]"})


def test_alpha_alone_has_no_effect(plan_of):
    notes = [note for note in plan_of(**{M + "lora_alpha": 32}).notes if "lora_alpha" in note]
    assert notes == ["no effect without adapters (model.lora_rank=0): actor_rollout_ref.model.lora_alpha"]


# ---- an adapter to start from ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"lora_rank": 4}, {"lora_alpha": 12}, {"target_modules": "[o_proj,q_proj]"}],
)
def test_an_adapter_decides_its_own_shape(plan_of, adapter, changes):
    from verl.config import ModelConfig, lora_options

    path = adapter(use_rslora=True, lora_dropout=0.1, inference_mode=True, loftq_config={}, bias="none")
    plan_of(**with_adapter(path, **changes))
    options = lora_options(ModelConfig(lora_adapter_path=str(path)))
    assert (options.rank, options.alpha, set(options.target_modules)) == (4, 12, {"q_proj", "o_proj"})
    assert options.shaping == {"use_rslora": True} and options.adapter_path == path


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"lora_rank": 8}, "lora_rank=8: the adapter in "),
        ({"lora_rank": 8}, "has 4; use that, or leave lora_rank out"),
        ({"lora_alpha": 32}, "has 12; use that, or leave lora_alpha out"),
        ({"target_modules": "[q_proj]"}, "has [q_proj,o_proj]; use that"),
        ({"exclude_modules": "[q_proj]"}, "has null; use that"),
    ],
)
def test_keys_that_contradict_an_adapter(problem_of, adapter, changes, text):
    assert text in problem_of(**with_adapter(adapter(), **changes))


@pytest.mark.parametrize(
    ("over", "text"),
    [
        ({"peft_type": "IA3"}, "is an adapter of kind IA3; only LORA"),
        ({"use_dora": True}, "has use_dora=True, which is not supported"),
        ({"bias": "all"}, "has bias=all, which is not supported"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save=['lm_head'], which is not supported"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights=pissa, which belongs to a base model"),
        ({"r": None}, "has no r or lora_alpha"),
        ({"target_modules": None}, "has no target_modules"),
    ],
)
def test_adapters_of_another_kind(problem_of, adapter, over, text):
    assert text in problem_of(**with_adapter(adapter(**over)))


def test_adapters_that_are_damaged_or_missing(problem_of, adapter):
    path = adapter()
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "adapter_model.safetensors is damaged: truncated" in problem_of(**with_adapter(path))
    weights.unlink()
    (path / "adapter_model.bin").write_bytes(b"")
    assert "has no adapter_model.safetensors (it has adapter_config.json, adapter_model.bin)" in problem_of(
        **with_adapter(path)
    )
    adapter()
    (path / "adapter_config.json").write_text("{")
    assert "adapter_config.json is damaged" in problem_of(**with_adapter(path))
    assert "no such directory; give the directory of a peft adapter" in problem_of(**with_adapter(path / "x"))


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_memory_of_adapters(plan_of, run_files):
    shapes = {
        "model.embed_tokens.weight": (512, 1024),
        "model.layers.0.self_attn.q_proj.weight": (4096, 1024),
        "model.layers.0.self_attn.o_proj.weight": (1024, 4096),
        "model.layers.0.mlp.experts.0.up_proj.weight": (2048, 1024),
        "lm_head.weight": (512, 1024),
    }
    run_files.write_safetensors(run_files.weights, shapes)
    parameters = sum(rows * columns for rows, columns in shapes.values())
    full = plan_of().memory.trainer_bytes
    lora = plan_of(**{M + "lora_rank": 8}).memory.trainer_bytes
    adapters = 8 * 2 * (4096 + 1024)
    # gradients and two moments of the adapters alone; their weights besides
    assert full - lora == 12 * parameters - 16 * adapters
    one = plan_of(**{M + "lora_rank": 8, M + "exclude_modules": "[o_proj]"}).memory.trainer_bytes
    assert full - one == 12 * parameters - 8 * adapters
    named = plan_of(**{M + "lora_rank": 8, M + "target_modules": "[q_proj]"}).memory.trainer_bytes
    assert named == one
