"""Keys that only upstream verl has: which values are accepted, and the notes about them."""

import ast

import pytest

from fixtures.config_error import load_error
from verl.config import PPOConfig, build, load_config, upstream
from verl.config.load import Prepared, read_composed
from verl.config.overrides import prepare
from verl.config.record import flat
from verl.config.values import value_problems

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"


def loaded(*overrides):
    from omegaconf import OmegaConf

    prepared = prepare(overrides)
    known = [text.lstrip("+") for text in prepared.overrides]
    return read_composed(OmegaConf.from_dotlist(known), prepared)


def nested(flat_values):
    result = {}
    for key, value in flat_values.items():
        *sections, name = key.split(".")
        inner = result
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return result


def saved_config():
    """The newest defaults of the table as one config, as upstream verl writes it."""
    from omegaconf import OmegaConf

    # The keys of Megatron are in the file for that engine, which sets `strategy=megatron` too.
    tables = {key: values for key, values in upstream._raw_defaults().items() if ".megatron." not in key}
    newest = {key: values[0] for key, values in tables.items() if values[0] != "???"}
    sections = {parent for key in newest for parent in upstream._ancestors(key)}
    return OmegaConf.create(nested({key: value for key, value in newest.items() if key not in sections}))


def test_a_config_saved_from_upstream_has_no_errors():
    result = read_composed(saved_config(), Prepared())
    assert result.problems == {}
    refused = value_problems(result.config)
    assert set(refused) <= {"actor_rollout_ref.model.path"}, refused
    (defaults,) = [note for note in result.notes if upstream.AT_DEFAULT in note]
    assert len(defaults) < 600
    # Values under old names are at their defaults, so that those under the current names count.
    saved = saved_config()
    saved.actor_rollout_ref.actor.optim.clip_grad = 0.25
    assert saved.actor_rollout_ref.actor.grad_clip == 1.0
    assert read_composed(saved, Prepared()).config.actor_rollout_ref.actor.optim.clip_grad == 0.25


def test_only_values_that_ask_for_something_of_a_saved_config_are_errors():
    saved = saved_config()
    saved.skip.async_rollout.enable = True
    saved.actor_rollout_ref.actor.router_replay.mode = "R2"
    saved.actor_rollout_ref.rollout.seed = 7
    problems = read_composed(saved, Prepared()).problems
    assert set(problems) == {
        "skip.async_rollout.enable",
        "actor_rollout_ref.actor.router_replay.mode",
        "actor_rollout_ref.rollout.seed",
    }


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        # at the default
        (["skip.async_rollout.enable=False", "skip.async_rollout.dump_dir=~/.verl/x"], upstream.AT_DEFAULT),
        ([f"{ROLLOUT}.prompt_length=512"], upstream.AT_DEFAULT),
        (["data.max_response_length=2048", f"{ROLLOUT}.response_length=2048"], upstream.AT_DEFAULT),
        ([f"{ACTOR}.rollout_n=5", f"{ROLLOUT}.n=5"], upstream.AT_DEFAULT),
        (["actor_rollout_ref.model.mtp.method=mtp", f"{ROLLOUT}.mtp.method=mtp"], upstream.AT_DEFAULT),
        ([f"{ACTOR}.data_loader_seed=42"], "trainer.seed decides"),
        # off
        ([f"{ACTOR}.use_prefix_grouper=False"], upstream.AT_DEFAULT),
        ([f"{ACTOR}.router_replay.mode=disabled"], upstream.AT_DEFAULT),
        (["+actor_rollout_ref.actor.veomni.param_offload=False"], upstream.AT_DEFAULT),
        # in a section that is off
        (["distillation.teacher_models.math.model_path=/t", "distillation.enabled=False"], upstream.AT_DEFAULT),
        (["critic.model.fused_kernel_options.impl_backend=triton"], upstream.AT_DEFAULT),
        # what is done here anyway
        ([f"{ACTOR}.fsdp_config.strategy=fsdp2"], "FSDP2 is the training engine"),
        ([f"{ACTOR}.fsdp_config.use_orig_params=True"], "FSDP2 always keeps the original parameters"),
        ([f"{ROLLOUT}.skip_tokenizer_init=False"], "token ids"),
        ([f"{ACTOR}.policy_loss.tau_pos=2.0", f"{ACTOR}.tau_pos=2.0"], "upstream verl reads actor.tau_pos"),
        (
            ["algorithm.adv_estimator=optimal_token_baseline", f"{ACTOR}.calculate_sum_pi_squared=True"],
            "the estimator decides it",
        ),
        (["trainer.use_legacy_worker_impl=disable"], "only one implementation"),
        (["transfer_queue.enable=True", "transfer_queue.backend.storage_backend=x"], "samples pass through the driver"),
    ],
)
def test_values_that_ask_for_nothing_are_accepted_with_a_note(overrides, note):
    result = loaded(*overrides)
    assert result.problems == {}
    assert any(note in text for text in result.notes), result.notes


@pytest.mark.parametrize(
    "override",
    [
        f"{ROLLOUT}.prompt_length=511",
        f"{ACTOR}.use_prefix_grouper=True",
        f"{ACTOR}.fsdp_config.strategy=fsdp_turbo",
        f"{ACTOR}.policy_loss.tau_pos=2.0",
        f"{ACTOR}.calculate_sum_pi_squared=True",
        f"{ACTOR}.data_loader_seed=7",
        f"{ACTOR}.optim.zero_indexed_step=False",
        "+skip.async_rollout.enable=True",
        f"{ROLLOUT}.over_sample_rate=0.1",
        # A number is no switch, and the null of critic.enable means automatic.
        "reward.sandbox_fusion.url=0",
        "actor_rollout_ref.model.mtp.enable=True",
        # Unknown there too: probably a typing error.
        "trainer.val_before_trian=False",
        f"{ACTOR}.use_prefix_gruper=False",
    ],
)
def test_values_that_ask_for_something_are_errors(override):
    key = override.lstrip("+").split("=")[0]
    text = load_error(override)
    assert any(f"'{name}" in text for name in (key, *(f"{section}.*" for section in upstream._ancestors(key)))), text


def test_a_default_that_follows_another_key_follows_it():
    """The default of `rollout.response_length` is `data.max_response_length`, and not 512."""
    assert "rollout.response_length" in load_error("data.max_response_length=2048", f"{ROLLOUT}.response_length=512")
    assert loaded("data.max_response_length=64", f"{ROLLOUT}.response_length=${{data.max_response_length}}").notes


def test_null_under_an_old_name_means_not_set(tmp_path):
    names = [
        "+custom_reward_function.name=null",
        "reward.custom_reward_function.name=null",
        f"+{ACTOR}.optim.warmup_style=null",
        "reward_model.enable=null",
    ]
    config = load_config(names)
    assert config.reward.custom_reward_function.name == "compute_score"
    assert config.actor_rollout_ref.actor.optim.lr_scheduler_type == "constant"
    (tmp_path / "mine.yaml").write_text(
        "defaults: [ppo_trainer, _self_]\nactor_rollout_ref: {actor: {optim: {warmup_style: null}}}\n"
    )
    config = load_config(config_path=tmp_path, config_name="mine")
    assert config.actor_rollout_ref.actor.optim.lr_scheduler_type == "constant"
    assert load_config([f"+{ACTOR}.grad_clip=null"]).actor_rollout_ref.actor.optim.clip_grad is None


def test_many_keys_are_noted_by_section():
    few, many = ({f"a.b.k{i}": upstream.AT_DEFAULT for i in range(count)} for count in (3, 30))
    assert upstream.notes(few)[0].endswith("a.b.k0, a.b.k1, a.b.k2")
    assert upstream.notes(many)[0].endswith(": a.* (30)")


def test_tables_name_keys_of_upstream_that_are_unknown_here():
    known = {*build.key_types(PPOConfig), *build.sections(PPOConfig)}
    for key in (*upstream.SAME, *upstream.DIFFERENT):
        assert key not in known, f"{key}: is a key now, so remove it from verl/config/upstream.py"
    for key in upstream.DIFFERENT:
        assert upstream._defaults()[key]
    for key in upstream.SAME.values():
        assert not key.equal_to or key.equal_to in known


def test_the_command_reads_defaults_from_checkouts(tmp_path, monkeypatch):
    import importlib.util
    from pathlib import Path

    path = Path(__file__).resolve().parents[2] / "scripts/upstream_defaults.py"
    spec = importlib.util.spec_from_file_location("upstream_defaults", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name, main, other in (("new", "a: {b: 1}", "a: {b: 9, c: x}"), ("old", "a: {b: 2}\nd: null", "a: {b: 8}")):
        folder = tmp_path / name / "verl/trainer/config"
        folder.mkdir(parents=True)
        (folder / "_generated_ppo_trainer.yaml").write_text(main)
        (folder / "_generated_ppo_megatron_trainer.yaml").write_text(other)
    found = script.table([tmp_path / "new", tmp_path / "old"])
    assert found == {"a.b": [1, 2], "a.c": ["x"], "d": [None]}
    with pytest.raises(FileNotFoundError, match="give a checkout of upstream verl"):
        script.table([tmp_path])


def test_the_table_holds_plain_values():
    for key, values in flat(upstream._raw_defaults()).items():
        assert isinstance(values, list) and values, key
        assert ast.literal_eval(repr(values)) == values
