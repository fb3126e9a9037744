"""Tests of deltas from a trainer: they add up to a full update for every model, scheme and number of ranks."""

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
    """Return the outcome of `delta_program` on rank 0: of the full update and of each delta."""
    source = write_tiny_model(tmp_path / "source", dtype=dtype, **MODELS[model])
    program = functools.partial(delta_program, **more)
    return run_ranks(ranks, program, str(source), {"quantization": quantization})[0]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("quantization", [None, "ascend", "fp8"])
@pytest.mark.parametrize("model", list(MODELS))
def test_deltas_add_up_to_a_full_update(tmp_path, model, quantization, ranks):
    full, *steps = deltas(tmp_path, model, quantization, ranks)
    unchanged = steps.pop(2)
    assert unchanged["differs"] == [] and unchanged["values"] == unchanged["nbytes"] == 0 and unchanged["buckets"] == 1
    full_bytes = full["full"]["full_bytes"]
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
def test_changes_of_merged_adapters_are_sent(tmp_path, quantization, ranks):
    options = {"lora_rank": 4, "lora_alpha": 16}
    _, *steps = deltas(tmp_path, "tied", quantization, ranks, options=options, rates=(1e-3, 1e-2))
    assert [step["differs"] for step in steps] == [[], []]
    assert Q_PROJ in steps[1]["changed"] and EMBED not in steps[1]["changed"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_kept_weights_do_not_change_with_the_model(tmp_path, ranks):
    """With bfloat16 master weights, which are sent as they are, the kept tensor must not be the parameter itself."""
    actor = actor_config(fsdp_config=fsdp_config(model_dtype="bf16", dtype="bfloat16"))
    _, *steps = deltas(tmp_path, "tied", None, ranks, dtype="bfloat16", actor=actor, rates=(1e-3, 1e-3))
    assert [step["differs"] for step in steps] == [[], []]
    assert all(step["values"] > 0 for step in steps)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("quantization", [None, "ascend"])
def test_parameters_without_a_row_mapping_are_compared_after_the_gather(tmp_path, quantization, ranks):
    _, *steps = deltas(tmp_path, "moe", quantization, ranks, turn="down_proj", rates=(1e-4, 1e-2))
    assert [step["differs"] for step in steps] == [[], []]
    assert "model.layers.0.mlp.experts.1.down_proj.weight" in steps[1]["changed"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_changes_are_gathered_several_times_per_update(tmp_path, ranks):
    _, *steps = deltas(tmp_path, "moe", "ascend", ranks, gather_bytes=30_000, rates=(1e-4, 1e-2))
    assert [step["differs"] for step in steps] == [[], []]
    assert steps[1]["buckets"] > 3


def test_frozen_layer_is_not_sent_until_it_is_trained(tmp_path):
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
def test_change_to_a_non_finite_weight_is_refused_on_all_ranks(tmp_path, quantization, name, row, value):
    source = write_tiny_model(tmp_path)
    rollout = {"quantization": quantization}
    for refused, kept, after, *differs in run_ranks(2, spoiled_program, str(source), rollout, name, row, value):
        assert f"'{name}' holds NaN or Inf: the training diverged" in refused
        assert kept == "cannot build a delta against version 1: no weights were sent yet"
        assert after == "" and differs == []


@pytest.mark.parametrize("base", [None, 1])
def test_only_a_finished_export_is_kept(tmp_path, base):
    source = write_tiny_model(tmp_path)
    nothing = "cannot build a delta against version {}: no weights were sent yet"
    for errors in run_ranks(2, aborted_program, str(source), base):
        other = "cannot build a delta against version 2: the last sent version is 3"
        assert errors == ["", nothing.format(1), nothing.format(2), "", other]


def test_delta_against_a_version_that_was_never_sent_is_refused_at_once(tmp_path):
    source = write_tiny_model(tmp_path)

    def program(rank):
        engine = make_engine(source)
        new, off = (Sending(rank, str(source), engine, {"checkpoint_engine": e}) for e in engines)
        off.send(1)
        return [refusal(sending.worker.begin_export, 2, 1) for sending in (new, off)], len(off.worker._last_sent._kept)

    from verl.config.rollout import CheckpointEngineConfig

    engines = [CheckpointEngineConfig(), CheckpointEngineConfig(delta="off")]
    [(errors, kept)] = run_ranks(1, program)
    assert errors == ["cannot build a delta against version 1: no weights were sent yet"] * 2 and kept == 0


def test_delta_may_follow_a_second_full_update_of_the_same_version(tmp_path):
    """The updater sends one when it checks an engine."""
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


ROUTER, NORM = "model.layers.0.mlp.gate.weight", "model.norm.weight"
# One of the tensors that transformers keeps in one packed parameter.
EXPERT = "model.layers.0.mlp.experts.1.up_proj.weight"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("quantization", "turn", "exact"),
    [
        (None, None, {ROUTER, NORM, Q_PROJ, EXPERT}),
        (None, "down_proj", {ROUTER, NORM}),  # the experts are converted after the gather
        ("ascend", None, {ROUTER, NORM, EMBED}),
    ],
)
def test_tensors_are_sent_in_the_dtypes_of_the_engine(tmp_path, quantization, turn, exact, ranks):
    """The master weights are float32, and everything else is rounded to bfloat16."""
    dtypes = dict.fromkeys(exact, "float32")
    full, *steps = deltas(tmp_path, "moe", quantization, ranks, turn=turn, rates=(1e-4, 1e-2), dtypes=dtypes)
    specs = {spec["name"]: spec["dtype"] for spec in full["full"]["manifest"]["specs"]}
    assert {name for name, dtype in specs.items() if dtype == "float32" and not name.endswith("_scale_inv")} == exact
    for step in steps:
        assert step["differs"] == [] and exact & step["changed"]
        # The scales and values of an encoded weight are never those of the master weight.
        assert exact.isdisjoint(step["rounded"]) and "model.layers.1.self_attn.k_proj.weight" in step["rounded"]
