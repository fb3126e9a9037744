"""`load_config`: composing files and overrides."""

import pickle

from fixtures.config_error import load_error
from verl.config import ConfigError, PPOConfig, load_config

# Overrides of a GRPO script of upstream verl, with unsupported features turned off.
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


def test_overrides_of_a_whole_script_load():
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


def test_user_file_extends_the_defaults(tmp_path):
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


def test_file_with_unknown_keys_and_wrong_types(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "defaults: [ppo_trainer, _self_]\ndata: {train_batchsize: 16}\ntrainer: {seed: x}\nextra: {a: {b: 1}}\n"
    )
    text = load_error(config_path=tmp_path, config_name="mine")
    assert "unknown key 'data.train_batchsize'; did you mean 'data.train_batch_size'?" in text
    assert "trainer.seed=x" in text and "extra.a.b" in text


def test_missing_file_and_missing_interpolation(tmp_path):
    assert "nothing" in load_error(config_path=tmp_path, config_name="nothing")
    (tmp_path / "mine.yaml").write_text("defaults: [ppo_trainer, _self_]\ntrainer: {seed: '${no.where}'}\n")
    assert "trainer.seed" in load_error(config_path=tmp_path, config_name="mine")


def test_user_file_without_the_defaults_list_gets_the_defaults(tmp_path):
    (tmp_path / "bare.yaml").write_text("data: {train_batch_size: 16}\n")
    config = load_config(["trainer.seed=5"], config_path=tmp_path, config_name="bare")
    assert (config.data.train_batch_size, config.trainer.seed, config.data.truncation) == (16, 5, "error")
    assert config.trainer.default_local_dir.endswith("/checkpoints/verl_examples/gsm8k")


def test_load_keeps_the_hydra_context_of_the_caller():
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.config", version_base="1.3"):
        load_config([])
        assert compose("ppo_trainer").trainer.seed == 0


def test_config_and_error_can_be_pickled():
    config = load_config(["data.train_batch_size=3"])
    assert pickle.loads(pickle.dumps(config)) == config
    error = ConfigError(["a: wrong", "b: wrong"])
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
