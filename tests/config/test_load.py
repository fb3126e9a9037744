import pickle

import pytest

from verl.config import ConfigError, PPOConfig, load_config


def refused(*overrides, **where):
    with pytest.raises(ConfigError) as caught:
        load_config(list(overrides), **where)
    return str(caught.value)


# What a GRPO run script sets, at values that leave features that are not there yet off.
SCRIPT = [
    "algorithm.adv_estimator=grpo",
    "algorithm.use_kl_in_reward=False",
    "algorithm.kl_ctrl.kl_coef=0.001",
    "algorithm.norm_adv_by_std_in_grpo=False",
    "algorithm.filter_groups.enable=False",
    "algorithm.rollout_correction.bypass_mode=False",
    "data.train_files=$HOME/data/gsm8k/train.parquet",
    'data.val_files=["a.parquet","b.parquet"]',
    "data.train_batch_size=1024",
    "data.max_prompt_length=512",
    "data.max_response_length=1024",
    "data.filter_overlong_prompts=True",
    "data.filter_overlong_prompts_workers=4",
    "data.truncation=error",
    "data.image_key=images",
    "data.return_raw_chat=True",
    "data.shuffle=False",
    "+data.apply_chat_template_kwargs.enable_thinking=False",
    "actor_rollout_ref.model.path=Qwen/Qwen3-8B",
    "actor_rollout_ref.model.use_remove_padding=True",
    "actor_rollout_ref.model.enable_gradient_checkpointing=True",
    "actor_rollout_ref.model.use_fused_kernels=False",
    "actor_rollout_ref.model.use_shm=False",
    "actor_rollout_ref.model.lora_rank=0",
    "+actor_rollout_ref.model.override_config.attn_implementation=eager",
    "actor_rollout_ref.hybrid_engine=True",
    "actor_rollout_ref.actor.strategy=fsdp2",
    "actor_rollout_ref.actor.optim.lr=1e-6",
    "actor_rollout_ref.actor.optim.lr_warmup_steps=10",
    "actor_rollout_ref.actor.optim.weight_decay=0.1",
    "actor_rollout_ref.actor.grad_clip=1",
    "actor_rollout_ref.actor.ppo_mini_batch_size=256",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=40",
    "actor_rollout_ref.actor.use_dynamic_bsz=True",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=24576",
    "actor_rollout_ref.actor.use_kl_loss=True",
    "actor_rollout_ref.actor.kl_loss_coef=0.001",
    "actor_rollout_ref.actor.kl_loss_type=low_var_kl",
    "actor_rollout_ref.actor.entropy_coeff=0",
    "actor_rollout_ref.actor.clip_ratio_low=0.2",
    "actor_rollout_ref.actor.clip_ratio_high=0.28",
    "actor_rollout_ref.actor.clip_ratio_c=10.0",
    "actor_rollout_ref.actor.loss_agg_mode=token-mean",
    "actor_rollout_ref.actor.policy_loss.loss_mode=vanilla",
    "actor_rollout_ref.actor.use_torch_compile=False",
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size=1",
    "actor_rollout_ref.actor.fsdp_config.param_offload=False",
    "actor_rollout_ref.actor.fsdp_config.optimizer_offload=False",
    "actor_rollout_ref.actor.fsdp_config.fsdp_size=-1",
    "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
    "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=1",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=40",
    "actor_rollout_ref.ref.log_prob_use_dynamic_bsz=True",
    "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=24576",
    "actor_rollout_ref.ref.fsdp_config.param_offload=False",
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.mode=async",
    "actor_rollout_ref.rollout.n=5",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=2",
    "actor_rollout_ref.rollout.gpu_memory_utilization=0.6",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=40",
    "actor_rollout_ref.rollout.enforce_eager=False",
    "actor_rollout_ref.rollout.free_cache_engine=True",
    "actor_rollout_ref.rollout.enable_chunked_prefill=True",
    "actor_rollout_ref.rollout.max_num_batched_tokens=10240",
    "actor_rollout_ref.rollout.calculate_log_probs=True",
    "actor_rollout_ref.rollout.temperature=1.0",
    "actor_rollout_ref.rollout.val_kwargs.do_sample=True",
    "actor_rollout_ref.rollout.val_kwargs.n=1",
    "actor_rollout_ref.rollout.multi_turn.enable=False",
    "actor_rollout_ref.rollout.checkpoint_engine.backend=naive",
    "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=4096",
    "+actor_rollout_ref.rollout.engine_kwargs.vllm.disable_mm_preprocessor_cache=True",
    "reward.reward_manager.name=naive",
    "+reward.reward_kwargs.max_resp_len=1024",
    "+reward.reward_kwargs.overlong_buffer_cfg.enable=False",
    "custom_reward_function.path=reward.py",
    "custom_reward_function.name=score",
    "reward_model.enable=False",
    "trainer.critic_warmup=0",
    'trainer.logger=["console","wandb"]',
    "trainer.project_name=verl_grpo",
    "trainer.experiment_name=qwen3_8b",
    "trainer.n_gpus_per_node=8",
    "trainer.nnodes=1",
    "trainer.save_freq=20",
    "trainer.test_freq=5",
    "trainer.val_before_train=False",
    "trainer.total_epochs=15",
    "trainer.balance_batch=True",
    "trainer.resume_mode=auto",
    "trainer.device=npu",
    "trainer.use_v1=True",
    "ray_kwargs.ray_init.num_cpus=16",
    "model_engine=dp",
]


def test_a_script_of_many_overrides_loads_and_only_the_machine_is_in_its_way():
    from verl.config.values import value_problems

    config = load_config(SCRIPT)
    assert value_problems(config) == {}
    assert config.data.val_files == ["a.parquet", "b.parquet"]
    assert config.data.apply_chat_template_kwargs == {"enable_thinking": False}
    assert config.actor_rollout_ref.actor.optim.lr == 1e-6
    assert config.actor_rollout_ref.actor.optim.clip_grad == 1.0
    assert config.actor_rollout_ref.actor.checkpoint.save_contents[-1] == "hf_model"
    assert config.actor_rollout_ref.rollout.engine_kwargs == {"vllm": {"disable_mm_preprocessor_cache": True}}
    assert config.reward.custom_reward_function.path == "reward.py"
    assert config.reward.custom_reward_function.name == "score"
    assert config.reward.reward_kwargs == {"max_resp_len": 1024, "overlong_buffer_cfg": {"enable": False}}
    assert config.ray_kwargs.ray_init == {"num_cpus": 16}
    assert config.trainer.default_local_dir.endswith("/checkpoints/verl_grpo/qwen3_8b")


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("trainer.total_epoch=3", "trainer.total_epochs"),
        ("+trainer.total_epoch=3", "trainer.total_epochs"),
        ("++data.train_batchsize=3", "data.train_batch_size"),
        ("actor_rollout_ref.actor.kl_coef=0.1", "actor_rollout_ref.actor.kl_loss_coef or algorithm.kl_ctrl.kl_coef"),
        ("actor_rollout_ref.model.max_prompt_length=5", "data.max_prompt_length"),
        ("algorithm.adv_estimater=grpo", "algorithm.adv_estimator"),
        ("trainer.n_gpu_per_node=1", "trainer.n_gpus_per_node"),
        ("actor_rollout_ref.rollout.val_kwargs.temprature=1", "actor_rollout_ref.rollout.val_kwargs.temperature"),
    ],
)
def test_an_unknown_key_names_the_nearest(override, nearest):
    text = refused(override)
    assert override.lstrip("+").split("=")[0] in text and f"did you mean {nearest}?" in text


def test_a_key_like_no_other_is_still_an_error():
    assert "there is no such key" in refused("xyzzy.plugh=1")
    assert "xyzzy/plugh: there is no such key" in refused("xyzzy/plugh=1")
    assert "trainer.project_name.x: there is no such key" in refused("trainer.project_name.x=1")
    assert refused("xyzzy=1", "trainer.seed=${no.where}") == "xyzzy: there is no such key, and none like it"


WRONG_TYPES = {
    "trainer.total_epochs=abc": "give a whole number",
    "trainer.test_freq=1.5": "give a whole number",
    "trainer.save_freq=null": "give a whole number, not null",
    "trainer.seed=True": "give a whole number",
    "data.shuffle=yes": "give True or False",
    "trainer.val_only=1": "give True or False",
    "actor_rollout_ref.actor.optim.lr=fast": "give a number",
    "actor_rollout_ref.actor.optim.weight_decay=nan": "give a number",
    "actor_rollout_ref.actor.optim.betas=[0.9,x]": "give a list such as [1,2]",
    "data.train_files={a:1}": "give text or a list such as [a,b]",
    "reward.reward_kwargs=3": "give a mapping",
}


def test_wrong_types_name_field_value_and_what_is_expected_all_at_once():
    lines = refused(*WRONG_TYPES).splitlines()
    assert lines[0] == f"{len(WRONG_TYPES)} problems:"
    for override, expected in WRONG_TYPES.items():
        name = override.split("=")[0]
        (line,) = [line for line in lines if line.startswith(f"- {name}=")]
        assert expected in line and (line.startswith(f"- {override}: ") or "{" in override or "[" in override)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("actor_rollout_ref.actor.use_token_level_loss=True", "loss_agg_mode=token-mean"),
        ("actor_rollout_ref.actor.tis_imp_ratio_cap=2", "rollout_is=token, with the cap as"),
        ("algorithm.rollout_correction.use_pure_rollout_correction=True", "bypass_mode=True with"),
        ("algorithm.rollout_correction.use_policy_gradient=True", "loss_type=reinforce"),
        ("algorithm.rollout_correction.rollout_rs_threshold_lower=0.5", "rollout_rs_threshold='0.5_2.0'"),
        ("algorithm.rollout_correction.rollout_token_veto_threshold=1e-4", "there is no veto"),
        ("actor_rollout_ref.rollout.multi_turn.tokenization_sanity_check_mode=strict", "leave it out"),
        ("+actor_rollout_ref.rollout.multi_turn.use_inference_chat_template=False", "leave it out"),
        ("critic.rollout_n=8", "leave it out, actor_rollout_ref.rollout.n counts"),
        ("actor_rollout_ref.rollout.trace.backend=weave", "traces of samples"),
        ("trainer.profile_steps=[1,2]", "use trainer.timeline"),
        ("actor_rollout_ref.actor.use_gpg_loss=True", "policy_loss.loss_mode=gpg"),
        ("trainer.use_legacy_worker_impl=False", "leave it out"),
        ("critic.model.fsdp_config.grad_offload=True", "leave it out"),
        ("actor_rollout_ref.rollout.response_length=64", "data.max_response_length"),
    ],
)
def test_keys_of_verl_that_are_not_here_name_the_way_here(override, words):
    text = refused(override)
    assert text.startswith(override.lstrip("+").split("=")[0].split(".trace.")[0]) and words in text, text


@pytest.mark.parametrize(
    "override", ["trainer.max_stairs=1", "actor_rollout_ref.actor.clip_ration=1", "nothing.here=1"]
)
def test_an_unknown_key_names_no_key_that_is_only_of_the_same_section(override):
    text = refused(override)
    assert text.endswith((", and none like it", "did you mean actor_rollout_ref.actor.clip_ratio?")), text


def test_a_section_that_is_not_here_is_said_once(tmp_path):
    given = ["reward_model.rollout.name=vllm", "reward.reward_model.rollout.n=1", "reward_model.micro_batch_size=2"]
    text = refused(*given)
    assert text.startswith("reward.reward_model: reward models are not run here") and "\n" not in text
    assert "examples/reward_model" in text and "reward.custom_reward_function" in text
    (tmp_path / "mine.yaml").write_text("defaults: [ppo_trainer, _self_]\nreward_model: {rollout: {n: 1, name: x}}\n")
    assert refused(config_path=tmp_path, config_name="mine") == text


@pytest.mark.parametrize("section", ["global_profiler", "actor_rollout_ref.actor.profiler", "critic.profiler"])
def test_profilers_are_said_once_and_name_the_timeline(section):
    text = refused(f"{section}.enable=True", f"{section}.tool=nsys")
    assert text.startswith(f"{section}: ") and "trainer.timeline" in text and "\n" not in text


def test_every_key_that_a_hint_names_exists():
    import re

    from verl.config import build, hints

    known = {*build.key_types(PPOConfig), *build.sections(PPOConfig)}
    for key, text in (*hints._HINTS.items(), *hints._SECTIONS.items()):
        assert key not in known
        named = re.findall(r"\b(?:actor_rollout_ref|algorithm|reward|trainer)\.[a-z_.]+\b", text)
        assert all(name in known or key.startswith(f"{name}.") for name in named), (key, named)


@pytest.mark.parametrize("old", ["reward_model.overlong_buffer", "custom_reward_function.overlong_buffer"])
def test_an_overlong_buffer_in_its_earlier_places(old, tmp_path):
    expected = {"overlong_buffer_cfg": {"enable": True, "len": 4}}
    config = load_config([f"+{old}.enable=True", f"+{old}.len=4", "reward_model.reward_manager=dapo"])
    assert config.reward.reward_kwargs == expected and config.reward.reward_manager.name == "dapo"
    section, name = old.split(".")
    (tmp_path / "mine.yaml").write_text(
        f"defaults: [ppo_trainer, _self_]\n{section}: {{{name}: {{enable: True, len: 4}}}}\n"
    )
    assert load_config(config_path=tmp_path, config_name="mine").reward.reward_kwargs == expected
    config = load_config(["reward_model.overlong_buffer_cfg.len=4", "+reward_model.reward_kwargs.max_resp_len=9"])
    assert config.reward.reward_kwargs == {"overlong_buffer_cfg": {"len": 4}, "max_resp_len": 9}


def test_the_earlier_name_of_bypass_mode(tmp_path):
    old = "bypass_old_logprob_for_rollout"
    assert load_config([f"algorithm.rollout_correction.{old}=True"]).algorithm.rollout_correction.bypass_mode is True
    (tmp_path / "mine.yaml").write_text(
        f"defaults: [ppo_trainer, _self_]\nalgorithm: {{rollout_correction: {{{old}: True}}}}\n"
    )
    config = load_config(config_path=tmp_path, config_name="mine")
    assert config.algorithm.rollout_correction.bypass_mode is True


def test_an_error_about_a_key_that_moved_names_it_as_it_was_given():
    text = refused("custom_reward_function.pth=x")
    assert text.startswith("custom_reward_function.pth, now reward.custom_reward_function.pth: there is no such key")


def test_numbers_that_fit_nowhere():
    for text in ("9" * 400, "-" + "9" * 400):
        assert "optim.lr=" in (problem := refused(f"actor_rollout_ref.actor.optim.lr={text}"))
        assert problem.endswith("...: give a number") and len(problem) < 300
    for value in (2**31, -(2**31), "2147483648.0", "9" * 400):
        problem = refused(f"data.train_batch_size={value}")
        assert problem.startswith("data.train_batch_size=") and "give a whole number" in problem
    assert "cannot be read as key=value (Exceeds the limit" in refused(f"data.seed={'9' * 5000}")
    assert refused(f"data.train_batch_size={2**31}").endswith("a whole number, at most 2147483647")
    assert load_config([f"trainer.seed={2**31 - 1}"]).trainer.seed == 2**31 - 1


def test_a_section_is_no_value():
    assert "trainer is a section" in refused("trainer=3")


def test_values_that_fit_after_conversion():
    config = load_config(
        [
            "actor_rollout_ref.actor.optim.lr='1e-6'",
            "actor_rollout_ref.actor.entropy_coeff=0",
            "trainer.experiment_name=123",
            "trainer.logger=console",
            "trainer.total_epochs=3.0",
            "reward.timeout=5",
            "trainer.total_training_steps=null",
        ]
    )
    assert config.actor_rollout_ref.actor.optim.lr == 1e-6
    assert isinstance(config.actor_rollout_ref.actor.entropy_coeff, float)
    assert config.trainer.experiment_name == "123"
    assert config.trainer.logger == ["console"]
    assert config.trainer.total_epochs == 3 and isinstance(config.trainer.total_epochs, int)
    assert config.trainer.total_training_steps is None


@pytest.mark.parametrize(
    "override", ["~trainer.total_epochs", "trainer.logger=console,file", "trainer.total_epochs", "data.seed=[1"]
)
def test_overrides_that_are_no_settings_are_refused_without_hydra_s_words(override):
    text = refused(override)
    assert override.lstrip("~").split("=")[0] in text and "Error" not in text


def test_old_spellings_move_and_an_override_wins_over_a_file(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "defaults: [ppo_trainer, _self_]\n"
        "custom_reward_function: {path: old.py, name: f}\n"
        "reward_model: {reward_manager: naive, num_workers: 3}\n"
        "actor_rollout_ref: {actor: {grad_clip: 0.5}}\n"
        "ray_init: {num_cpus: 7}\n"
    )
    config = load_config(["custom_reward_function.path=new.py"], config_path=tmp_path, config_name="mine")
    assert (config.reward.custom_reward_function.path, config.reward.custom_reward_function.name) == ("new.py", "f")
    assert config.reward.num_workers == 3
    assert config.actor_rollout_ref.actor.optim.clip_grad == 0.5
    assert config.ray_kwargs.ray_init["num_cpus"] == 7


def test_a_file_of_the_user_s_on_top_of_the_framework_s(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "defaults: [ppo_trainer, _self_]\n"
        "data: {train_batch_size: 16}\n"
        "actor_rollout_ref: {actor: {ppo_mini_batch_size: '${data.train_batch_size}', optim: {lr: 3e-4}}}\n"
        "trainer: {experiment_name: mine}\n"
    )
    config = load_config(["data.train_batch_size=32"], config_path=str(tmp_path), config_name="mine")
    assert config.data.train_batch_size == config.actor_rollout_ref.actor.ppo_mini_batch_size == 32
    assert config.actor_rollout_ref.actor.optim.lr == 3e-4
    assert config.data.max_prompt_length == PPOConfig().data.max_prompt_length
    assert config.trainer.default_local_dir.endswith("verl_examples/mine")


def test_unknown_keys_and_wrong_types_in_a_file_are_errors_too(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "defaults: [ppo_trainer, _self_]\ndata: {train_batchsize: 16}\ntrainer: {seed: x}\nextra: {a: {b: 1}}\n"
    )
    text = refused(config_path=tmp_path, config_name="mine")
    assert "data.train_batchsize: there is no such key; did you mean data.train_batch_size?" in text
    assert "trainer.seed=x" in text and "extra.a.b" in text


def test_a_file_that_is_not_there_or_leads_nowhere(tmp_path):
    assert "nothing" in refused(config_path=tmp_path, config_name="nothing")
    (tmp_path / "mine.yaml").write_text("defaults: [ppo_trainer, _self_]\ntrainer: {seed: '${no.where}'}\n")
    assert "trainer.seed" in refused(config_path=tmp_path, config_name="mine")


def test_a_whole_config_without_the_framework_s_file_takes_the_defaults(tmp_path):
    (tmp_path / "bare.yaml").write_text("data: {train_batch_size: 16}\n")
    config = load_config(["trainer.seed=5"], config_path=tmp_path, config_name="bare")
    assert (config.data.train_batch_size, config.trainer.seed, config.data.truncation) == (16, 5, "error")
    assert config.trainer.default_local_dir.endswith("/checkpoints/verl_examples/gsm8k")


def test_hydra_of_the_caller_survives():
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.config", version_base="1.3"):
        load_config([])
        assert compose("ppo_trainer").trainer.seed == 0


def test_paths_are_absolute_and_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config = load_config(["actor_rollout_ref.model.path=~/m", "trainer.default_local_dir=out"])
    assert config.actor_rollout_ref.model.path == str(tmp_path / "m")
    assert config.trainer.default_local_dir == str(tmp_path / "out")


def test_config_and_error_survive_pickling():
    config = load_config(["data.train_batch_size=3"])
    assert pickle.loads(pickle.dumps(config)) == config
    error = ConfigError(["a: wrong", "b: wrong"])
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_hydra_discovers_the_search_path_plugin():
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    import hydra_plugins.verl_searchpath as plugin
    from verl.config.searchpath import VerlSearchPath

    assert plugin.VerlSearchPath is VerlSearchPath
    load_config([])
    assert Plugins.instance().discover(SearchPathPlugin).count(VerlSearchPath) == 1


def test_where_hydra_does_not_discover_the_plugin_it_is_registered(monkeypatch, tmp_path):
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    (tmp_path / "mine.yaml").write_text("defaults: [ppo_trainer, _self_]\n")
    known = Plugins.instance().plugin_type_to_subclass_list
    others = [plugin for plugin in known[SearchPathPlugin] if plugin.__name__ != "VerlSearchPath"]
    monkeypatch.setitem(known, SearchPathPlugin, others)
    assert load_config(config_path=tmp_path, config_name="mine") == load_config()
