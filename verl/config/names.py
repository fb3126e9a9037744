"""Names that a config value may have, and for estimators and policy losses the keys that they read.

Plain strings and tables, because the registries behind them import torch. tests/config/test_names.py compares both.
"""

from __future__ import annotations

from dataclasses import dataclass

from verl.utils.quantization import formats, schemes


@dataclass(frozen=True)
class Estimator:
    """Properties of an advantage estimator.

    Attributes:
        reads: keys of `algorithm` that only some estimators read, and this one does.
        values: it reads a critic's values.
        sum_pi_squared: it reads the sum of the squared probabilities at each token.
        groups: the advantage of a sample depends on the other samples of its prompt.
    """

    reads: tuple[str, ...] = ()
    values: bool = False
    sum_pi_squared: bool = False
    groups: bool = False


# The functions are in verl.algorithms.advantages.
ADV_ESTIMATORS = {
    "gae": Estimator(reads=("gamma", "lam"), values=True),
    "gdpo": Estimator(
        reads=("norm_adv_by_std_in_grpo", "gdpo_reward_keys", "gdpo_reward_weights"),
        groups=True,
    ),
    "gpg": Estimator(groups=True),
    "grpo": Estimator(reads=("norm_adv_by_std_in_grpo",), groups=True),
    "grpo_passk": Estimator(reads=("norm_adv_by_std_in_grpo",), groups=True),
    "grpo_vectorized": Estimator(reads=("norm_adv_by_std_in_grpo",), groups=True),
    "opo": Estimator(groups=True),
    "optimal_token_baseline": Estimator(groups=True, sum_pi_squared=True),
    "reinforce_plus_plus": Estimator(reads=("gamma",)),
    "reinforce_plus_plus_baseline": Estimator(groups=True),
    "remax": Estimator(),
    "rloo": Estimator(groups=True),
    "rloo_vectorized": Estimator(groups=True),
    "tir_optimal_token_baseline": Estimator(groups=True, sum_pi_squared=True),
}
CRITIC_ESTIMATORS = tuple(name for name, estimator in ADV_ESTIMATORS.items() if estimator.values)
SUM_PI_SQUARED_ESTIMATORS = tuple(name for name, estimator in ADV_ESTIMATORS.items() if estimator.sum_pi_squared)
GROUP_ESTIMATORS = tuple(name for name, estimator in ADV_ESTIMATORS.items() if estimator.groups)


@dataclass(frozen=True)
class PolicyLoss:
    """Properties of a policy loss; docs/algorithms.md has the papers.

    Attributes:
        reads: keys of `actor_rollout_ref.actor` that only some losses read, and this one does.
        own_aggregation: it aggregates token losses in its own way and ignores `loss_agg_mode`.
        clips_ratio: it clips the ratio of probabilities, so that a `clip_ratio_low` above 1 never clips.
        paper_clip_range: clip range of its paper, if this differs in kind from PPO's.
    """

    reads: tuple[str, ...] = ()
    own_aggregation: bool = False
    clips_ratio: bool = False
    paper_clip_range: str = ""


_CLIP_RANGE = ("clip_ratio", "clip_ratio_low", "clip_ratio_high")
_DPPO = PolicyLoss(
    reads=(*_CLIP_RANGE, "clip_ratio_c"),
    paper_clip_range=(
        "clip_ratio_low=0.15, clip_ratio_high=0.15 (bounds of a divergence) and a clip_ratio_c of 20 or more"
    ),
)
# The functions are in verl.algorithms.losses.
POLICY_LOSSES = {
    # Chosen by algorithm.rollout_correction.bypass_mode; it reads what `vanilla` or `gpg` reads.
    "bypass_mode": PolicyLoss(),
    "cispo": PolicyLoss(reads=_CLIP_RANGE),
    "clip_cov": PolicyLoss(
        reads=(*_CLIP_RANGE, "policy_loss.clip_cov_ratio", "policy_loss.clip_cov_lb", "policy_loss.clip_cov_ub"),
        clips_ratio=True,
    ),
    "dppo_kl": _DPPO,
    "dppo_tv": _DPPO,
    "dro": PolicyLoss(reads=("policy_loss.dro_beta",)),
    "geo_mean": PolicyLoss(reads=_CLIP_RANGE, own_aggregation=True),
    "gpg": PolicyLoss(),
    "gspo": PolicyLoss(
        reads=_CLIP_RANGE,
        own_aggregation=True,
        clips_ratio=True,
        paper_clip_range="clip_ratio_low=3e-4 and clip_ratio_high=4e-4 (bounds of a sequence's mean ratio)",
    ),
    "kl_cov": PolicyLoss(reads=("policy_loss.kl_cov_ratio", "policy_loss.ppo_kl_coef")),
    "sapo": PolicyLoss(reads=("tau_pos", "tau_neg"), own_aggregation=True),
    "vanilla": PolicyLoss(reads=(*_CLIP_RANGE, "clip_ratio_c"), clips_ratio=True),
}
LOSS_AGG_MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
_KL = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")
KL_TYPES = (*_KL, *(f"{name}+" for name in _KL))
UNSUPPORTED_KL_TYPES = ("full",)
DISTILLATION_LOSSES = _KL

UNSUPPORTED_ENGINES = ("megatron", "veomni", "torchtitan")

REWARD_MANAGERS = ("dapo", "gdpo", "naive")
UNSUPPORTED_REWARD_MANAGERS = ("batch", "prime", "rate_limited", "remote")

QUANTIZATIONS = schemes.SCHEME_NAMES
ASCEND_SCHEMES = formats.ASCEND_SCHEMES

# Sources of an engine's first weights: vLLM's loaders, and those of vllm-ascend.
LOAD_FORMATS = (
    *("dummy", "auto", "safetensors", "hf", "pt", "npcache", "mistral", "fastsafetensors", "instanttensor"),
    *("ipc_cache", "modelexpress", "runai_streamer", "runai_streamer_sharded", "sharded_state", "tensorizer"),
    *("netloader", "rfork"),
)
LOGGERS = ("console", "file", "swanlab", "tensorboard", "wandb")
UNSUPPORTED_LOGGERS = ("clearml", "mlflow", "rl_insight", "trackio", "vemlp_wandb")
# Loggers that need a package: the package, and the argument of `pip install` that installs it.
LOGGER_PACKAGES = {
    "swanlab": ("swanlab", "'verl[swanlab]'"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "'verl[wandb]'"),
}

CHECKPOINT_CONTENTS = ("model", "optimizer", "extra", "hf_model")

# The classes are in verl.agent_loop.
AGENT_LOOPS = ("single_turn_agent", "tool_agent")
TOOL_FORMATS = ("hermes",)
UNSUPPORTED_TOOL_FORMATS = ("gemma4", "gpt-oss", "qwen3_coder")

# `fsdp_config.qat`: its modes with the schemes of `ascend` that they compute in, and layers that are ignored by
# default, as in upstream verl. `QAT_WEIGHTS_ONLY` leaves inputs as they are, unlike the engine.
QAT_WEIGHTS_ONLY = "w8a16_mxfp8"
QAT_MODES = {
    "w8a8_mxfp8": formats.W8A8_MXFP8,
    "w4a8_mxfp": formats.W4A8_MXFP,
    QAT_WEIGHTS_ONLY: formats.W8A8_MXFP8,
}
QAT_IGNORED = ("lm_head", "embed_tokens", "re:.*mlp.gate$")
