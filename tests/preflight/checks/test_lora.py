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
    """Give the tensors of the checkpoint the names of a model's layers."""
    config = json.loads((run_files.model / "config.json").read_text())
    config |= {"hidden_size": 16, "vocab_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    (run_files.model / "config.json").write_text(json.dumps(config))
    run_files.write_safetensors(run_files.weights, LAYERS)


@pytest.fixture
def adapter(run_files):
    """Return a function that writes an adapter of rank 4; `over` replaces fields of its config, None removes one."""

    def write(**over):
        path = run_files.root / "adapter"
        path.mkdir(exist_ok=True)
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "o_proj"]} | over
        config = {name: value for name, value in config.items() if value is not None}
        (path / "adapter_config.json").write_text(json.dumps(config))
        run_files.write_safetensors(path / "adapter_model.safetensors", {"q_proj.lora_A.weight": (4, 16)})
        return path

    return write


def with_adapter(path, **changes):
    return {M + "lora_adapter_path": path} | {M + name: value for name, value in changes.items()}


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"lora_rank": -1}, "lora_rank=-1: must be at least 0"),
        ({"lora_rank": 4, "lora_alpha": 0}, "lora_alpha=0: must be above 0"),
        ({"lora_rank": 4, "lora_alpha": -2}, "lora_alpha=-2: must be above 0"),
        ({"target_modules": "[q_proj]"}, "target_modules=[q_proj]: requires adapters, but"),
        ({"lora_rank": 4, "target_modules": "[]"}, "target_modules=[]: no layer would be trained; use all-linear"),
        ({"lora_rank": 4, "target_modules": "''"}, "target_modules='': matches no layer; use all-linear"),
        (
            {"lora_rank": 4, "target_modules": "[qproj]"},
            "target_modules: the model has no layer qproj; similar names: q_proj",
        ),
        (
            {"lora_rank": 4, "target_modules": "[zzz]"},
            "no layer zzz; use one of embed_tokens, lm_head, o_proj, q_proj, up_proj",
        ),
        (
            {"lora_rank": 4, "target_modules": "[mlp.q_proj]"},
            "target_modules: the model has no layer mlp.q_proj; similar names:",
        ),
        (
            {"lora_rank": 4, "target_modules": "'.*(v|k)_proj'"},
            "matches no full name of a layer; a full name is e.g. model.layers.0",
        ),
        (
            {"lora_rank": 4, "exclude_modules": "[qproj]"},
            "exclude_modules: the model has no layer qproj; similar names: q_proj",
        ),
        ({"lora_rank": 4, "exclude_modules": "'.*zzz'"}, "exclude_modules=.*zzz: this regular expression"),
        ({"lora_rank": 4, "exclude_modules": "'.*_proj'"}, "exclude_modules=.*_proj: excludes every layer of"),
        (
            {"lora_rank": 4, "target_modules": "[q_proj]", "exclude_modules": "[self_attn.q_proj]"},
            "exclude_modules=[self_attn.q_proj]: excludes every layer of "
            "actor_rollout_ref.model.target_modules=[q_proj]",
        ),
        ({"lora_rank": 4, "target_modules": "q_proj"}, "use [q_proj]"),
        ({"lora_rank": 4, "target_modules": "'q_(proj'"}, "is not a regular expression (missing ), unterminated"),
        ({"lora_rank": 4, "target_parameters": "[gate_up_proj]"}, "target_parameters=[gate_up_proj] is not supported"),
        ({"lora__rank": 4}, "use actor_rollout_ref.model.lora_rank"),
    ],
)
def test_invalid_keys_are_errors(problem_of, changes, text):
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
def test_valid_keys_have_a_plan(plan_of, changes):
    """Does not raise."""
    plan_of(**{M + name: value for name, value in changes.items()})


def test_layer_names_of_a_model_with_experts_are_not_checked(plan_of, run_files):
    """Does not raise."""
    run_files.write_safetensors(run_files.weights, {"model.layers.1.mlp.experts.0.w1.weight": (8, 16)})
    plan_of(**{M + "lora_rank": 4, M + "target_modules": "[q_proj]"})


def test_excluded_modules_without_adapters_are_a_warning(plan_of):
    (warning,) = plan_of(**{M + "exclude_modules": "DONT_EXCLUDE"}).warnings
    assert warning == (
        "actor_rollout_ref.model.exclude_modules=DONT_EXCLUDE has no effect: there are no adapters "
        "(actor_rollout_ref.model.lora_rank=0)"
    )


def test_alpha_without_a_rank_is_unused(plan_of):
    notes = [note for note in plan_of(**{M + "lora_alpha": 32}).notes if "lora_alpha" in note]
    assert notes == ["no effect without adapters (model.lora_rank=0): actor_rollout_ref.model.lora_alpha"]


# ---- initial adapter ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"lora_rank": 4}, {"lora_alpha": 12}, {"target_modules": "[o_proj,q_proj]"}],
)
def test_an_adapter_gives_rank_alpha_and_layers(plan_of, adapter, changes):
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
def test_keys_that_contradict_an_adapter_are_errors(problem_of, adapter, changes, text):
    assert text in problem_of(**with_adapter(adapter(), **changes))


@pytest.mark.parametrize(
    ("over", "text"),
    [
        ({"peft_type": "IA3"}, "has peft_type=IA3; only adapters of kind LORA"),
        ({"use_dora": True}, "has use_dora=True, which is not supported"),
        ({"bias": "all"}, "has bias=all, which is not supported"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save=['lm_head'], which is not supported"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights=pissa, which requires a modified base model"),
        *(
            ({"r": value}, f"has r={shown}, which must be a whole number of at least 1; save the adapter")
            for value, shown in (
                (None, "null"),
                (0, "0"),
                (-1, "-1"),
                (4.0, "4.0"),
                ("4", "4"),
                (True, "True"),
                ([4], "[4]"),
            )
        ),
        *(
            ({"lora_alpha": value}, "which must be a number above 0; save the adapter")
            for value in (None, 0, -1, float("nan"), float("inf"), "12", True, [12])
        ),
        *(
            ({"target_modules": value}, "which must be a list of names, or a regular expression; save")
            for value in (None, [], "", [1], [""], {"q_proj": 1}, 5)
        ),
        ({"target_modules": "q_(proj"}, "target_modules='q_(proj', which is not a regular expression (missing )"),
        ({"exclude_modules": "*"}, "exclude_modules='*', which is not a regular expression (nothing to repeat"),
        ({"exclude_modules": 5}, "exclude_modules=5, which must be a list of names"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern={'q_proj': 0}, which must map names of layers"),
        ({"rank_pattern": [8]}, "rank_pattern=[8], which must map names of layers"),
        ({"rank_pattern": {"(": 8}}, "rank_pattern.(, which is not a regular expression"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern={'q_proj': nan}, which must map"),
        ({"use_rslora": "yes"}, "use_rslora=yes, which must be true or false"),
        ({"r": 8}, "has r=8, but q_proj.lora_A.weight in adapter_model.safetensors has rank 4; copy both"),
    ],
)
def test_unsupported_adapters_are_errors(problem_of, adapter, over, text):
    assert text in problem_of(**with_adapter(adapter(**over)))


def test_damaged_and_missing_adapters_are_errors(problem_of, adapter):
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
