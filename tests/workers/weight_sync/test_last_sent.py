"""What a trainer sends as changes adds up to what it would send in full, whatever the model, scheme and ranks."""

import functools

import pytest

from fixtures.engine_cases import actor_config, fsdp_config, make_engine
from fixtures.ranks import run_ranks
from fixtures.sent_cases import Sending, aborted_program, delta_program, optimizer_step, refusal, spoiled_program
from fixtures.tiny import write_tiny_model

Q_PROJ, EMBED = "model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"
# Three experts and 127 tokens: two ranks hold different numbers of rows.
MODELS = {
    "tied": {"kind": "qwen3", "tied": True},
    "untied": {"kind": "qwen3", "tied": False, "vocab_size": 127},
    "moe": {"kind": "qwen3_moe", "tied": False, "num_experts": 3},
}


def deltas(tmp_path, model, quantization, ranks, dtype="float32", **more):
    """Rank 0's outcome of `delta_program`: of the whole update, and of each delta."""
    source = write_tiny_model(tmp_path / "source", dtype=dtype, **MODELS[model])
    program = functools.partial(delta_program, **more)
    return run_ranks(ranks, program, str(source), {"quantization": quantization})[0]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("quantization", [None, "ascend", "fp8"])
@pytest.mark.parametrize("model", list(MODELS))
def test_changes_add_up_to_everything(tmp_path, model, quantization, ranks):
    whole, *steps = deltas(tmp_path, model, quantization, ranks)
    nothing = steps.pop(2)
    assert nothing["differs"] == [] and nothing["values"] == nothing["nbytes"] == 0 and nothing["buckets"] == 1
    full_bytes = whole["whole"]["full_bytes"]
    for step in steps:
        assert step["differs"] == [] and step["values"] > 0
        assert step["export"]["full_bytes"] == full_bytes
        manifest = step["export"]["manifest"]
        assert manifest["num_values"] == step["values"] and manifest["num_buckets"] == step["buckets"]
    small, _, large = (step["nbytes"] for step in steps)
    assert 0 < small < full_bytes / 4 < large
    if model == "moe":
        assert "model.layers.1.mlp.experts.2.gate_proj.weight" in steps[-1]["changed"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("quantization", [None, "ascend"])
def test_what_merged_adapters_change_is_sent(tmp_path, quantization, ranks):
    options = {"lora_rank": 4, "lora_alpha": 16}
    _, *steps = deltas(tmp_path, "tied", quantization, ranks, options=options, rates=(1e-3, 1e-2))
    assert [step["differs"] for step in steps] == [[], []]
    assert Q_PROJ in steps[1]["changed"] and EMBED not in steps[1]["changed"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_that_are_sent_as_they_are_do_not_change_with_the_model(tmp_path, ranks):
    """bfloat16 master weights: what is kept must not be the parameter itself."""
    actor = actor_config(fsdp_config=fsdp_config(model_dtype="bf16", dtype="bfloat16"))
    _, *steps = deltas(tmp_path, "tied", None, ranks, dtype="bfloat16", actor=actor, rates=(1e-3, 1e-3))
    assert [step["differs"] for step in steps] == [[], []]
    assert all(step["values"] > 0 for step in steps)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("quantization", [None, "ascend"])
def test_parameters_whose_rows_cannot_be_told_are_compared_once_they_are_whole(tmp_path, quantization, ranks):
    _, *steps = deltas(tmp_path, "moe", quantization, ranks, turn="down_proj", rates=(1e-4, 1e-2))
    assert [step["differs"] for step in steps] == [[], []]
    assert "model.layers.0.mlp.experts.1.down_proj.weight" in steps[1]["changed"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_changes_are_gathered_in_chunks(tmp_path, ranks):
    _, *steps = deltas(tmp_path, "moe", "ascend", ranks, chunk=30_000, rates=(1e-4, 1e-2))
    assert [step["differs"] for step in steps] == [[], []]
    assert steps[1]["buckets"] > 3


def test_a_layer_that_is_frozen_is_not_sent_until_it_is_trained(tmp_path):
    layer = "model.layers.1."
    _, *steps = deltas(tmp_path, "tied", "ascend", 2, freeze=layer, rates=(1e-3,) * 4)
    assert [step["differs"] for step in steps] == [[]] * 4
    assert [any(layer in name for name in step["changed"]) for step in steps] == [False, False, True, True]
    assert all("model.layers.0.mlp.up_proj.weight" in step["changed"] for step in steps)


@pytest.mark.parametrize(
    ("quantization", "name", "row", "value"),
    [
        ("ascend", Q_PROJ, 0, float("nan")),
        ("ascend", Q_PROJ, -1, float("inf")),
        ("ascend", EMBED, -1, float("nan")),
        ("fp8", Q_PROJ, -1, float("nan")),
        ("fp8", "model.norm.weight", -1, float("-inf")),
    ],
)
def test_a_change_to_what_is_not_finite_is_refused_on_all_ranks(tmp_path, quantization, name, row, value):
    source = write_tiny_model(tmp_path)
    rollout = {"quantization": quantization}
    for told, kept, after, *differs in run_ranks(2, spoiled_program, str(source), rollout, name, row, value):
        assert f"'{name}' holds NaN or Inf: the training diverged" in told
        assert kept == "the trainer keeps nothing, a delta to version 1 was asked for"
        assert after == "" and differs == []


@pytest.mark.parametrize("base", [None, 1])
def test_only_what_was_finished_is_kept(tmp_path, base):
    source = write_tiny_model(tmp_path)
    nothing = "the trainer keeps nothing, a delta to version {} was asked for"
    for said in run_ranks(2, aborted_program, str(source), base):
        other = "the trainer keeps version 3, a delta to version 2 was asked for"
        assert said == ["", nothing.format(1), nothing.format(2), "", other]


def test_a_delta_to_what_was_never_sent_is_refused_before_anything_is_sent(tmp_path):
    source = write_tiny_model(tmp_path)

    def program(rank):
        engine = make_engine(source)
        new, off = (Sending(rank, str(source), engine, {"checkpoint_engine": e}) for e in engines)
        off.send(1)
        return [refusal(sending.worker.begin_export, 2, 1) for sending in (new, off)], len(off.worker._last_sent._kept)

    from verl.config.rollout import CheckpointEngineConfig

    engines = [CheckpointEngineConfig(), CheckpointEngineConfig(delta="off")]
    [(said, kept)] = run_ranks(1, program)
    assert said == ["the trainer keeps nothing, a delta to version 1 was asked for"] * 2 and kept == 0


def test_a_delta_may_follow_a_whole_update_of_the_same_version(tmp_path):
    """As when an engine is checked."""
    source = write_tiny_model(tmp_path)

    def program(rank):
        engine = make_engine(source)
        sending = Sending(rank, str(source), engine, {})
        sending.send(5)
        sending.send(5)
        optimizer_step(engine, 1e-4, 0)
        return sending.send(6, 5)["manifest"]

    [manifest] = run_ranks(1, program)
    assert manifest["base"] == 5 and manifest["num_values"] > 0
