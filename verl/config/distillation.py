"""`distillation`: a teacher model that scores the policy's samples, and the loss that pulls the policy to it."""

# ruff: noqa: RUF009  (key, unsupported and section return dataclass fields)
from __future__ import annotations

from dataclasses import dataclass

from verl.config import names
from verl.config.conditions import when
from verl.config.fixed_engine import FixedEngineConfig
from verl.config.schema import ConfigSection, key, section, unsupported

_BY_POLICY_GRADIENT = when("use_policy_gradient")
_FORWARD_KL = when("loss_mode", "forward_kl_topk")


@dataclass
class DistillationLossConfig(ConfigSection):
    """The distillation loss, an estimate of KL(policy || teacher) on the policy's own samples."""

    loss_mode: str = key(
        "k3",
        "estimator of the KL divergence per token; k1 needs use_policy_gradient=True",
        choices=names.DISTILLATION_LOSSES,
        unsupported=("forward_kl_topk",),
        use="use k1 with use_policy_gradient=True, or k3",
    )
    topk: int | None = key(32, "forward_kl_topk: tokens of the teacher per position", only_with=_FORWARD_KL)
    use_task_rewards: bool = key(
        True,
        "add the distillation loss to the loss of the `actor` section; False: train on the distillation loss alone",
    )
    distillation_loss_coef: float = key(
        1.0, "weight of the distillation loss", at_least=0, only_with=when("use_task_rewards")
    )
    loss_max_clamp: float | None = key(
        None, "largest magnitude of a token's distillation loss; null: no limit", above=0
    )
    log_prob_min_clamp: float | None = key(
        None, "forward_kl_topk: least log-probability in the divergence", only_with=_FORWARD_KL
    )
    use_policy_gradient: bool = key(
        False,
        "the negative estimate is the advantage of its token in PPO's clipped loss; False: the estimate is "
        "differentiated",
    )
    policy_loss_mode: str = key(
        "vanilla", "policy loss of use_policy_gradient", choices=("vanilla",), only_with=_BY_POLICY_GRADIENT
    )
    clip_ratio: float = key(
        0.2, "accepted for compatibility; clip_ratio_low and clip_ratio_high are the clip range", above=0
    )
    clip_ratio_low: float = key(
        0.2, "lower clip range: the ratio is clipped below 1 - clip_ratio_low", above=0, only_with=_BY_POLICY_GRADIENT
    )
    clip_ratio_high: float = key(
        0.2, "upper clip range: the ratio is clipped above 1 + clip_ratio_high", above=0, only_with=_BY_POLICY_GRADIENT
    )


@dataclass
class TeacherInferenceConfig(FixedEngineConfig):
    """The engines of the teacher."""

    max_model_len: int | None = key(
        None,
        "maximum length of a scored sample; null: data.max_prompt_length + data.max_response_length + 1",
        unit="tokens",
        at_least=1,
    )
    enable_prefix_caching: bool = key(True, "accepted for compatibility; vLLM computes every scored token again")


@dataclass
class TeacherConfig(ConfigSection):
    """The teacher model."""

    model_path: str | None = key(
        None,
        "directory or hub name of the teacher, which must have the policy's tokenizer",
        path=True,
        hub=True,
    )
    key: str | None = unsupported(None, "several teachers", "leave it out: the teacher scores every sample")
    num_replicas: int = unsupported(
        0, "a number of engines", "leave it out: n_gpus_per_node and nnodes determine the number of engines"
    )
    inference: TeacherInferenceConfig = section(TeacherInferenceConfig, "the engines of the teacher")


@dataclass
class TeacherModelsConfig(ConfigSection):
    """The teacher; several teachers are not supported."""

    teacher_model: TeacherConfig = section(TeacherConfig, "the teacher model")


@dataclass
class DistillationConfig(ConfigSection):
    """On-policy distillation: a teacher scores the policy's samples, and a loss pulls the policy to the teacher."""

    enabled: bool = key(False, "distill from a teacher")
    n_gpus_per_node: int = key(8, "devices of the teacher on each of its nodes", unit="devices", at_least=1)
    nnodes: int = key(0, "nodes of the teacher's engines, with n_gpus_per_node devices each of their own", at_least=0)
    teacher_key: str = key(
        "data_source", "accepted for compatibility; it chooses among several teachers, which are not supported"
    )
    teacher_models: TeacherModelsConfig = section(TeacherModelsConfig, "the teacher")
    distillation_loss: DistillationLossConfig = section(DistillationLossConfig, "the distillation loss")

    @property
    def teacher(self) -> TeacherConfig:
        """The section of the teacher."""
        return self.teacher_models.teacher_model
