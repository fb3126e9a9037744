"""A checkpoint of another model, of other adapters, or without a part, is refused before the run starts."""

import shutil

import pytest

from fixtures.dcp_metadata import write_metadata
from fixtures.run_files import with_overrides
from verl.config.lora import lora_options
from verl.preflight.checks.resume_model import check_resume_model
from verl.preflight.findings import Findings
from verl.utils.model_dir.model_files import ModelFiles

WEIGHTS = {
    "model.embed_tokens.weight": (32, 16),
    **{f"model.layers.{i}.self_attn.q_proj.weight": (32, 16) for i in range(2)},
    **{f"model.layers.{i}.mlp.down_proj.weight": (16, 48) for i in range(2)},
    "model.norm.weight": (16,),
    "lm_head.weight": (32, 16),
}
CRITIC = {name: shape for name, shape in WEIGHTS.items() if name != "lm_head.weight"} | {"score.weight": (1, 16)}


def adapters(rank=4, layers=("self_attn.q_proj",), depth=2):
    found = {}
    for i in range(depth):
        for layer in layers:
            rows, columns = WEIGHTS[f"model.layers.{min(i, 1)}.{layer}.weight"]
            found[f"model.layers.{i}.{layer}.lora_A.default.weight"] = (rank, columns)
            found[f"model.layers.{i}.{layer}.lora_B.default.weight"] = (rows, rank)
    return found


def model_files(shapes=WEIGHTS, layers=2, **config):
    fields = {"num_hidden_layers": layers, **config}
    return ModelFiles("/models/mine", fields, fields, None, None, len(shapes), shapes)


@pytest.fixture
def checkpoint(tmp_path):
    directory = tmp_path / "global_step_4"
    experts = {"model.layers.0.mlp.experts.gate_up_proj": (3, 2)}
    for model, shapes in (("actor", WEIGHTS | experts), ("critic", CRITIC)):
        for part in ("model", "optimizer"):
            (directory / model / part).mkdir(parents=True)
            write_metadata(directory / model / part, shapes)
        (directory / model / "engine.json").write_text("{}")
    (directory / "data.pt").write_text("state")
    return directory


@pytest.fixture
def errors_of(run_files, checkpoint):
    """A function that returns the errors for a model and a config with changes."""

    def errors(model=None, critic=None, **changes):
        config, found = with_overrides(run_files.overrides(**changes)), Findings()
        lora_options(config.actor_rollout_ref.model)  # valid keys
        check_resume_model(config, checkpoint, model or model_files(), critic or model_files(), found)
        return found.errors

    return errors


@pytest.fixture
def error_of(errors_of):
    def error(*arguments, **changes):
        [found] = errors_of(*arguments, **changes)
        return found

    return error


GAE = {"algorithm__adv_estimator": "gae", "critic__model__path": "/models/critic"}


@pytest.mark.parametrize("keys", [{}, GAE])
def test_the_same_model_is_accepted(errors_of, keys):
    assert errors_of(**keys) == []


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (model_files(WEIGHTS | {"model.norm.weight": (24,)}), r"model.norm.weight has shape \[24\], and \[16\] in"),
        (model_files(layers=3), "it has 3 layers, and the model in the checkpoint has 2"),
        (model_files(layers=1), "it has 1 layers, and the model in the checkpoint has 2"),
        (model_files({"h.0.attn.c_attn.weight": (1, 2)}), "another kind of model: model.embed_tokens.weight and the"),
        (model_files({}, layers=5), "it has 5 layers"),
    ],
)
def test_another_model_is_refused_by_name(error_of, checkpoint, files, says):
    import re

    error = error_of(files)
    assert error.startswith("actor_rollout_ref.model.path=/models/mine: ")
    assert re.search(says, error)
    assert error.endswith(
        f"use the model that it was saved with to continue {checkpoint}, or start a new run with "
        "trainer.resume_mode=disable"
    )


@pytest.mark.parametrize(
    "files",
    [
        model_files({f"language_model.{name}": shape for name, shape in WEIGHTS.items()}),
        model_files({name.replace("model.", "model.language_model."): shape for name, shape in WEIGHTS.items()}),
        model_files(WEIGHTS | {"model.layers.2.mtp.weight": (3, 3)}),
        model_files(WEIGHTS | {"model.layers.0.mlp.experts.gate_up_proj": (2, 3)}),
        model_files(layers=7, text_config={}),
        model_files({}, layers=None),
    ],
    ids=["prefix", "prefix within", "further layer in the files", "experts", "several stacks", "nothing known"],
)
def test_what_cannot_be_compared_is_left_to_the_trainer(errors_of, files):
    assert errors_of(files) == []


def test_another_critic_is_refused(error_of):
    other = model_files(CRITIC | {"model.norm.weight": (24,)})
    assert error_of(critic=other, **GAE).startswith("critic.model.path=/models/mine: model.norm.weight has shape [24]")


@pytest.mark.parametrize("part", ["model", "optimizer", "engine.json"])
def test_a_missing_part_is_named(error_of, errors_of, checkpoint, part):
    path = checkpoint / "actor" / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    error = error_of()
    assert error.startswith(f"actor_rollout_ref.actor.checkpoint.load_contents: {checkpoint / 'actor'} has no {part}, ")
    if part != "model":
        kept = "[model,optimizer]" if part == "engine.json" else "[model,extra]"
        assert errors_of(actor_rollout_ref__actor__checkpoint__load_contents=kept) == []


def test_missing_critic_state_and_metadata_are_named(error_of, checkpoint):
    (checkpoint / "actor" / "model" / ".metadata").unlink()
    assert error_of().startswith(f"{checkpoint / 'actor' / 'model'} has no .metadata")
    write_metadata(checkpoint / "actor" / "model", WEIGHTS)
    shutil.rmtree(checkpoint / "critic")
    assert error_of(**GAE).startswith(f"{checkpoint} has no critic, but algorithm.adv_estimator=gae trains one")
    (checkpoint / "data.pt").unlink()
    assert error_of().startswith(f"{checkpoint} has no data.pt")


RANK, TARGETS = "actor_rollout_ref__model__lora_rank", "actor_rollout_ref__model__target_modules"


def test_adapters_of_the_same_run_are_accepted(errors_of, checkpoint):
    write_metadata(checkpoint / "actor" / "model", adapters())
    assert errors_of(**{RANK: 4}) == errors_of(**{RANK: 4, TARGETS: "[q_proj]"}) == []
    write_metadata(checkpoint / "actor" / "model", adapters(depth=1))
    assert errors_of(**{RANK: 4}) == []


@pytest.mark.parametrize(
    ("saved", "keys", "start"),
    [
        (adapters(), {}, "lora_rank=0: the checkpoint holds adapters of a model, and not the model; set lora_rank=4 "),
        (WEIGHTS, {RANK: 4}, "lora_rank=4: the checkpoint holds a whole model without adapters; leave the keys"),
        (
            adapters(8),
            {RANK: 4},
            "lora_rank=4: the adapters in the checkpoint have rank 8; set lora_rank=8 to continue ",
        ),
        (
            adapters(layers=("self_attn.q_proj", "mlp.down_proj")),
            {RANK: 4, TARGETS: "[q_proj]"},
            "target_modules=[q_proj]: the checkpoint has adapters in the layers down_proj, q_proj; set target_modules=["
            "down_proj,q_proj] to continue ",
        ),
        (
            adapters(),
            {RANK: 4, TARGETS: "[q_proj,down_proj]"},
            "target_modules=[q_proj,down_proj]: the checkpoint has ",
        ),
        (adapters(depth=3), {RANK: 4}, "path=/models/mine: it has 2 layers, and the model in the checkpoint has 3"),
        (
            {"model.layers.0.mlp.down_proj.lora_A.default.weight": (4, 99)},
            {RANK: 4},
            "path=/models/mine: model.layers.0.mlp.down_proj has shape [16, 48] in the model, and an adapter of",
        ),
    ],
)
def test_other_adapters_are_refused_by_name(error_of, checkpoint, saved, keys, start):
    write_metadata(checkpoint / "actor" / "model", saved)
    error = error_of(**keys)
    assert error.startswith(f"actor_rollout_ref.model.{start}")
    assert f"to continue {checkpoint}, or start a new run" in error
