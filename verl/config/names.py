"""Names that a config value may have. Plain strings: the registries behind some of them import torch."""

from verl.utils.quantization.schemes import SCHEME_NAMES as QUANTIZATIONS  # noqa: F401  (a list of names like the others)

# verl.trainer.ppo.core_algos holds the functions; a test compares the two.
ADV_ESTIMATORS = (
    "gae",
    "gdpo",
    "gpg",
    "grpo",
    "grpo_passk",
    "grpo_vectorized",
    "opo",
    "optimal_token_baseline",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "rloo",
    "rloo_vectorized",
    "tir_optimal_token_baseline",
)
# Estimators that read a critic's values.
CRITIC_ESTIMATORS = ("gae",)
# Estimators that read the sum of the squared probabilities at each token.
SUM_PI_SQUARED_ESTIMATORS = ("optimal_token_baseline", "tir_optimal_token_baseline")
# Estimators whose advantage of a sample is relative to the other samples of its prompt.
GROUP_ESTIMATORS = (
    "gdpo",
    "gpg",
    "grpo",
    "grpo_passk",
    "grpo_vectorized",
    "opo",
    "optimal_token_baseline",
    "reinforce_plus_plus_baseline",
    "rloo",
    "rloo_vectorized",
    "tir_optimal_token_baseline",
)

POLICY_LOSSES = (
    "bypass_mode",
    "cispo",
    "clip_cov",
    "dppo_kl",
    "dppo_tv",
    "dro",
    "geo_mean",
    "gpg",
    "gspo",
    "kl_cov",
    "sapo",
    "vanilla",
)
LOSS_AGG_MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
_KL = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")
KL_TYPES = (*_KL, *(f"{name}+" for name in _KL))
UNSUPPORTED_KL_TYPES = ("full",)

REWARD_MANAGERS = ("dapo", "gdpo", "naive")
UNSUPPORTED_REWARD_MANAGERS = ("batch", "prime", "rate_limited", "remote")

LOGGERS = ("console", "file", "swanlab", "tensorboard", "wandb")
UNSUPPORTED_LOGGERS = ("clearml", "mlflow", "rl_insight", "trackio", "vemlp_wandb")
# Package behind a logger, and what to install for it.
LOGGER_PACKAGES = {
    "swanlab": ("swanlab", "'verl[swanlab]'"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "'verl[wandb]'"),
}

CHECKPOINT_CONTENTS = ("model", "optimizer", "extra", "hf_model")

# verl.agent_loop registers the loops and holds the parsers; a test compares them.
AGENT_LOOPS = ("single_turn_agent", "tool_agent")
TOOL_FORMATS = ("hermes",)
UNSUPPORTED_TOOL_FORMATS = ("gemma4", "gpt-oss", "qwen3_coder")
