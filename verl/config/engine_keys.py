"""Keys of upstream verl's other training engines, and the keys of FSDP2 that they correspond to."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

_ROLES = {
    "actor_rollout_ref.actor": "actor_rollout_ref.actor.fsdp_config",
    "actor_rollout_ref.ref": "actor_rollout_ref.ref.fsdp_config",
    "critic": "critic.fsdp",
}
_SHARDED = "FSDP2 divides every weight among all ranks"
_HUGGING_FACE = "weights are read and written in Hugging Face format"
_KERNELS = "a choice among the engine's kernels"
_ONE_TOKEN = "a model predicts one token at a time, without MTP"
_NO_LAYERS_APART = "FSDP2 gives each rank a part of every layer, not some of the layers"
_CHECKPOINTING = "actor_rollout_ref.model.enable_gradient_checkpointing"
_OFF = ("false", "null", "none", "0", "0.0", "disabled", "")


@dataclass
class Translation:
    """Overrides for FSDP2 that replace those of another engine.

    Attributes:
        overrides: the overrides of a run on FSDP2.
        renamed: (old override, new override).
        dropped: old overrides by the reason why FSDP2 needs none in their place.
        refused: errors about overrides that change the training and have no equivalent.
    """

    overrides: list[str] = field(default_factory=list)
    renamed: list[tuple[str, str]] = field(default_factory=list)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    @property
    def needed(self) -> bool:
        """True if the overrides name another engine."""
        return bool(self.renamed or self.dropped or self.refused)


@dataclass(frozen=True)
class _Override:
    text: str
    role: str
    value: str

    @property
    def off(self) -> bool:
        return self.value.strip("'\"").lower() in _OFF


_Rule = Callable[[_Override, Translation], None]


def _to(target: str) -> _Rule:
    """Return the rule that another key has the same value; `{role}` and `{fsdp}` are the role's sections."""

    def rule(given: _Override, result: Translation) -> None:
        key = target.format(role=given.role, fsdp=_ROLES[given.role])
        _rename(given, f"{key}={given.value}", result)

    return rule


def _rename(given: _Override, new: str, result: Translation) -> None:
    result.renamed.append((given.text, new))
    if new not in result.overrides:
        result.overrides.append(new)


def _drop(reason: str) -> _Rule:
    return lambda given, result: result.dropped.setdefault(reason, []).append(given.text)


def _refuse_unless_off(reason: str, *also_off: str) -> _Rule:
    """Return the rule that a feature that changes the training must be off."""

    def rule(given: _Override, result: Translation) -> None:
        if given.off or given.value in also_off:
            _drop("off")(given, result)
        else:
            result.refused.append(f"{given.text}: {reason}; leave it out")

    return rule


def _if_on(new: str) -> _Rule:
    """Return the rule that a feature that is on becomes `new`."""

    def rule(given: _Override, result: Translation) -> None:
        if given.off:
            _drop("off")(given, result)
        else:
            _rename(given, new.format(role=given.role, fsdp=_ROLES[given.role]), result)

    return rule


def _schedule(given: _Override, result: Translation) -> None:
    if given.value.strip("'\"") in ("constant", "cosine"):
        _rename(given, f"{given.role}.optim.lr_scheduler_type={given.value}", result)
    else:
        result.refused.append(f"{given.text}: only constant and cosine are supported; use one of them")


_PARALLEL = _drop(_SHARDED)
_LAYERS_APART = _drop(_NO_LAYERS_APART)
_SEQUENCE_PARALLEL = _to("{role}.ulysses_sequence_parallel_size")
_REPLAY = _refuse_unless_off("the routing of the rollout is not replayed in training")
_RECOMPUTE = _if_on(f"{_CHECKPOINTING}=True")
# By the part of the key behind `{role}.megatron.`; the first pattern that matches decides.
_MEGATRON: dict[str, _Rule] = {
    "param_offload": _to("{fsdp}.param_offload"),
    "optimizer_offload": _to("{fsdp}.optimizer_offload"),
    "grad_offload": _drop("gradients exist only during an update"),
    r"(override_transformer_config\.)?context_parallel_size": _SEQUENCE_PARALLEL,
    "dtype": _to("{fsdp}.dtype"),
    "use_remove_padding": _to("actor_rollout_ref.model.use_remove_padding"),
    r"(tensor|expert)_model_parallel_size|expert_tensor_parallel_size": _PARALLEL,
    r"(override_transformer_config\.)?sequence_parallel|use_megatron_fsdp|use_distributed_optimizer": _PARALLEL,
    "(virtual_)?pipeline_model_parallel_size": _LAYERS_APART,
    r"override_transformer_config\..*pipeline.*": _LAYERS_APART,
    "use_mbridge|vanilla_mbridge|use_dist_checkpointing|dist_checkpointing_path|load_weight": _drop(_HUGGING_FACE),
    r"router_replay\.mode": _REPLAY,
    r"override_transformer_config\.recompute_granularity": _RECOMPUTE,
    r"override_transformer_config\.recompute_.*": _drop(f"{_CHECKPOINTING} recomputes whole layers"),
    r"override_transformer_config\.moe_(aux_loss|z_loss)_coeff": _refuse_unless_off("experts have no auxiliary loss"),
    r"override_transformer_config\.moe_router_load_balancing_type": _refuse_unless_off(
        "experts have no auxiliary loss", "none", "'none'"
    ),
    r"override_transformer_config\.fp8.*": _refuse_unless_off("the trainer does not compute in fp8"),
    r"override_(transformer|ddp)_config\..*": _drop(_KERNELS),
}
_VEOMNI: dict[str, _Rule] = {
    "param_offload": _to("{fsdp}.param_offload"),
    "optimizer_offload": _to("{fsdp}.optimizer_offload"),
    "enable_fsdp_offload": _to("{fsdp}.offload_policy"),
    "enable_full_shard": _to("{fsdp}.reshard_after_forward"),
    "fsdp_size": _to("{fsdp}.fsdp_size"),
    "ulysses_parallel_size": _SEQUENCE_PARALLEL,
    "expert_parallel_size": _PARALLEL,
    "attn_implementation": _drop("the attention backend is chosen for the device"),
    r"router_replay\.mode": _REPLAY,
    ".*_implementation": _drop(_KERNELS),
}
# Keys outside of these sections that only these engines read, by the part behind the role.
_OPTIMIZER: dict[str, _Rule] = {
    r"optim\.lr_decay_style": _schedule,
    r"optim\.lr_decay_steps": _drop("the schedule has the length of the run"),
    r"optim\.lr_warmup_init": _refuse_unless_off("the warmup starts at 0"),
    r"optim\.min_lr": _refuse_unless_off("the minimum is optim.min_lr_ratio, a fraction of optim.lr"),
    r"optim\.override_optimizer_config\.(optimizer_cpu_offload|(optimizer_)?offload_fraction)": _if_on(
        "{fsdp}.optimizer_offload=True"
    ),
    r"optim\.override_optimizer_config\..*": _drop("a setting of the engine's optimizer"),
}
_ENGINES = {"megatron": _MEGATRON, "veomni": _VEOMNI}
# Words that only a command for one of these engines has.
_OF_ENGINE = re.compile(
    r"\+{0,2}[\w.]+\.(megatron|veomni)\.[\w.]+=.*|(model_engine|[\w.]+\.strategy)=['\"]?(megatron|veomni)['\"]?"
    r"|--config-name=.*_(megatron|veomni)_.*",
    re.DOTALL,
)
_WORD = re.compile(r"\+{0,2}([\w.]+)=(.*)", re.DOTALL)
_MTP = "actor_rollout_ref.model.mtp."


def translate(words: Sequence[str]) -> Translation:
    """Return overrides for FSDP2 in place of those for Megatron or VeOmni; other overrides stay as they are.

    Args:
        words: the arguments of a training command.
    """
    result = Translation()
    if not any(_OF_ENGINE.fullmatch(word) for word in words):
        result.overrides = list(words)
        return result
    for word in words:
        _translate_word(word, result)
    return result


def _translate_word(word: str, result: Translation) -> None:
    if re.match(r"--config-(path|name)\b", word):
        result.dropped.setdefault("the config of FSDP2 is the default", []).append(word)
        return
    match = _WORD.fullmatch(word)
    if match is None:
        result.overrides.append(word)
        return
    key, value = match.groups()
    if key == "model_engine":
        result.dropped.setdefault("FSDP2 is the default", []).append(word)
        return
    if key.startswith(_MTP):
        rule = _refuse_unless_off(_ONE_TOKEN) if key.startswith(f"{_MTP}enable") else _drop(_ONE_TOKEN)
        rule(_Override(word, "actor_rollout_ref.actor", value), result)
        return
    role = next((role for role in _ROLES if key.startswith(f"{role}.")), None)
    found = None if role is None else _rule_of(key.removeprefix(f"{role}."), value)
    if role is None or found is None:
        result.overrides.append(word)
        return
    found(_Override(word, role, value), result)


def _rule_of(key: str, value: str) -> _Rule | None:
    """Return the rule of a key behind its role; None if it is no key of another engine."""
    if key == "strategy" and value.strip("'\"") in _ENGINES:
        return lambda given, result: _rename(given, f"{given.role}.strategy=fsdp2", result)
    engine, _, name = key.partition(".")
    if engine in _ENGINES:
        return _first(_ENGINES[engine], name) or _refuse_unless_off(f"{engine} has no such key that FSDP2 knows")
    return _first(_OPTIMIZER, key)


def _first(rules: dict[str, _Rule], name: str) -> _Rule | None:
    return next((rule for pattern, rule in rules.items() if re.fullmatch(pattern, name)), None)
