import json

import pytest

MODEL = "actor_rollout_ref.model"
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


def rewrite_config(run_files, **changes):
    path = run_files.model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("field", ["attention_dropout", "resid_pdrop", "router_jitter_noise", "layerdrop"])
def test_dropout_and_noise_cannot_be_set(problem_of, plan_of, field):
    override = "actor_rollout_ref__model__override_config"
    text = problem_of(**{override: f"{{{field}: 0.1}}"})
    assert text.startswith(f"{MODEL}.override_config.{field}=0.1: ") and "leave it out" in text
    assert plan_of(**{override: f"{{{field}: 0.0}}"})


def test_dropout_of_the_critic_cannot_be_set(problem_of, run_files):
    changes = {"algorithm__adv_estimator": "gae", "critic__model__path": run_files.model}
    text = problem_of(**changes, critic__model__override_config="{attention_dropout: 0.1}")
    assert text.startswith("critic.model.override_config.attention_dropout=0.1: ")


def test_dropout_of_the_checkpoint_is_noted(plan_of, run_files):
    rewrite_config(run_files, attention_dropout=0.1, hidden_dropout=0.0)
    [note] = [note for note in plan_of().notes if "dropout" in note]
    assert "attention_dropout=0.1 of its config.json" in note and "hidden_dropout" not in note


@pytest.mark.parametrize(
    ("model", "rope", "text"),
    [
        ("phi3", {"factor": 3.0}, r"rope_scaling.factor=3.0: vLLM ignores it and uses 4"),
        ("phi3", {"attention_factor": 1.5}, r"rope_scaling.attention_factor=1.5: vLLM ignores it and uses 1.22474"),
        ("phi3", {"long_mscale": 1.5}, r"rope_scaling.long_mscale=1.5: transformers ignores it and uses 1.22474"),
        ("llama", {"rope_type": "dynamic", "factor": 2.0, "max_trained_positions": 8}, "max_trained_positions=8: vLLM"),
        ("llama", {"rope_type": "dynamic", "factor": 2.0, "alpha": 8.0}, "alpha=8.0: vLLM uses it"),
    ],
)
def test_rope_that_transformers_and_vllm_scale_differently_is_an_error(problem_of, run_files, model, rope, text):
    rewrite_config(run_files, model_type=model, original_max_position_embeddings=16, rope_scaling=LONGROPE | rope)
    assert text in problem_of()


@pytest.mark.parametrize(
    ("model", "rope"),
    [
        ("phi3", {}),
        ("phi3", {"factor": 4.0, "attention_factor": 1.224745, "short_mscale": 1.224745}),
        ("phi3", {"type": "su", "rope_type": "su"}),
        ("llama", {"rope_type": "dynamic", "factor": 2.0}),
        ("hunyuan_v1_dense", {"rope_type": "dynamic", "alpha": 8.0}),
        ("qwen3", {"rope_type": "yarn", "factor": 4.0, "attention_factor": 2.0}),
    ],
)
def test_rope_that_both_scale_alike_is_accepted(plan_of, run_files, model, rope):
    rewrite_config(run_files, model_type=model, original_max_position_embeddings=16, rope_scaling=LONGROPE | rope)
    assert plan_of()


def test_dynamic_rope_does_not_reach_further_than_the_positions(problem_of, run_files):
    rope = {"rope_type": "dynamic", "factor": 4.0}
    rewrite_config(run_files, max_position_embeddings=31, rope_scaling=rope)
    assert "has 31 positions" in problem_of()


def test_a_window_that_vllm_makes_larger_must_not_be_reached(problem_of, plan_of, run_files):
    rewrite_config(run_files, model_type="cohere2", sliding_window=8)
    assert "sliding_window=8: vLLM's cohere2 attends to one token more" in problem_of()
    rewrite_config(run_files, sliding_window=4096)
    assert plan_of()
    rewrite_config(run_files, model_type="mistral", sliding_window=8)
    assert plan_of()


OVERRIDE = "actor_rollout_ref__model__override_config"


@pytest.mark.parametrize(
    ("backend", "fields", "words"),
    [
        ("flash_attention_2", {"alibi": True}, "it ignores the ALiBi biases"),
        ("flex_attention", {"model_type": "bloom"}, "it ignores the ALiBi biases"),
        ("flash_attention_2", {"add_full_attention_sink_bias": True}, "sinks of"),
    ],
)
def test_an_attention_backend_that_ignores_a_part_is_an_error(problem_of, run_files, backend, fields, words):
    rewrite_config(run_files, **fields)
    text = problem_of(**{OVERRIDE: f"{{attn_implementation: {backend}}}"})
    assert text.startswith(f"{MODEL}.override_config.attn_implementation={backend}: ") and words in text
    assert "use eager" in text


def test_an_attention_backend_that_is_not_compared_is_a_warning_with_the_models_fields(plan_of, run_files):
    rewrite_config(run_files, attn_logit_softcapping=50.0, sliding_window=16, final_logit_softcapping=None)
    [warning] = plan_of(**{OVERRIDE: "{attn_implementation: flex_attention}"}).warnings
    assert "is not compared with eager attention" in warning
    assert "(attn_logit_softcapping=50.0, sliding_window=16 in its config.json)" in warning


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_an_attention_backend_that_is_compared_is_accepted(plan_of, run_files, backend):
    rewrite_config(run_files, attn_logit_softcapping=50.0, alibi=True)
    assert not plan_of(**{OVERRIDE: f"{{attn_implementation: {backend}}}"}).warnings
