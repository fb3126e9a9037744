"""Keys that only upstream verl has: values that ask for nothing, so that they are accepted with a note.

A value asks for nothing if it is the key's default in upstream verl, if it switches a feature off, if the key belongs
to a section that is switched off, or if it means what is done here anyway (`SAME`). `DIFFERENT` lists defaults of
upstream verl whose effect differs from the behavior here. upstream_defaults.json contains the defaults;
`python scripts/upstream_defaults.py` writes it from a checkout.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from verl.config import legacy, names
from verl.config.schema import show

FILE = Path(__file__).with_name("upstream_defaults.json")

Lookup = Callable[[str], Any]

AT_DEFAULT = "keys that only upstream verl has, at their defaults or switched off"
_MODELS = ("actor_rollout_ref.actor.fsdp_config", "actor_rollout_ref.ref.fsdp_config", "critic.fsdp")
_ROLLOUT = "actor_rollout_ref.rollout"
_MULTI_TURN = f"{_ROLLOUT}.multi_turn"
_OFF: tuple[Any, ...] = (None, False, "", "disable", "disabled", "none", [], {})  # a number is no switch
_SEEDS = "trainer.seed decides all random numbers"
_KEPT_TOKENS = "tokens of the model are kept as they were generated"
_NO_IMAGES = "prompts contain no images"


@dataclass(frozen=True)
class Same:
    """Values of a key that mean what is done here anyway.

    Attributes:
        why: the reason.
        values: the values; empty if all values mean the same.
        equal_to: the value must be that of this key instead.
        only_with: another key and its values, without which the value would ask for something.
    """

    why: str
    values: tuple[Any, ...] = ()
    equal_to: str = ""
    only_with: tuple[str, tuple[Any, ...]] | None = None

    def holds(self, value: Any, lookup: Lookup) -> bool:
        """Return True if the value means what is done here."""
        if self.only_with is not None and lookup(self.only_with[0]) not in self.only_with[1]:
            return False
        if self.equal_to:
            return equal(value, lookup(self.equal_to))
        return not self.values or any(equal(value, known) for known in self.values)


SAME: dict[str, Same] = {
    **{f"{model}.strategy": Same("FSDP2 is the training engine", ("fsdp", "fsdp2")) for model in _MODELS},
    **{f"{model}.use_orig_params": Same("FSDP2 always keeps the original parameters") for model in _MODELS},
    **{f"{model}.wrap_policy.min_num_params": Same("each decoder layer is sharded separately") for model in _MODELS},
    **{
        f"actor_rollout_ref.actor.policy_loss.{name}": Same(
            f"upstream verl reads actor.{name}", equal_to=f"actor_rollout_ref.actor.{name}"
        )
        for name in ("tau_pos", "tau_neg")
    },
    "actor_rollout_ref.actor.calculate_sum_pi_squared": Same(
        "the estimator decides it",
        (True,),
        only_with=("algorithm.adv_estimator", names.SUM_PI_SQUARED_ESTIMATORS),
    ),
    "actor_rollout_ref.actor.calculate_entropy": Same("the entropy is always computed", (True, False)),
    "actor_rollout_ref.actor.checkpoint.strict": Same("a checkpoint must always be complete"),
    "critic.checkpoint.strict": Same("a checkpoint must always be complete"),
    f"{_ROLLOUT}.skip_tokenizer_init": Same("the engine receives and returns token ids"),
    f"{_ROLLOUT}.multi_stage_wake_up": Same("an update always wakes the weights first and the KV cache last"),
    f"{_MULTI_TURN}.tokenization_sanity_check_mode": Same(_KEPT_TOKENS),
    f"{_MULTI_TURN}.use_inference_chat_template": Same(_KEPT_TOKENS),
    "data.use_shm": Same("files are read where they are"),
    "data.return_multi_modal_inputs": Same(_NO_IMAGES),
    "data.image_patch_size": Same(_NO_IMAGES),
    "trainer.use_legacy_worker_impl": Same(
        "there is only one implementation", ("disable", "auto", "enable", True, False)
    ),
    "trainer.ray_wait_register_center_timeout": Same("workers need no register center"),
}
"""Keys of which some values mean what is done here anyway."""

SAME_SECTIONS: dict[str, Same] = {"transfer_queue": Same("samples pass through the driver")}
"""Sections whose keys change no result."""

DIFFERENT: dict[str, str] = {
    **{f"{model}.seed": _SEEDS for model in _MODELS},
    "actor_rollout_ref.actor.data_loader_seed": _SEEDS,
    f"{_ROLLOUT}.seed": _SEEDS,
}
"""Keys whose default in upstream verl differs in effect from the behavior here, and what is done here."""

# Sections without a switch `enable` of their own: another key, and its values with which the section is off.
_SWITCHES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "critic.model.fused_kernel_options": ("critic.model.use_fused_kernels", _OFF),
    f"{_ROLLOUT}.trace": (f"{_ROLLOUT}.trace.backend", _OFF),
    "algorithm.pf_ppo": ("algorithm.use_pf_ppo", _OFF),
    "reward.sandbox_fusion": ("reward.sandbox_fusion.url", _OFF),
    **{f"{model}.turbo_config": (f"{model}.strategy", ("fsdp", "fsdp2")) for model in _MODELS},
    "trainer.v1.separate_async.hybrid_rollout": ("trainer.v1.separate_async.hybrid_rollout.enable_switch", _OFF),
    **{
        f"trainer.v1.{mode}": ("trainer.v1.trainer_mode", ("sync",))
        for mode in ("colocate_async", "separate_async", "sampler")
    },
}
_INTERPOLATION = re.compile(r"\$\{(?:oc\.select:)?\s*([\w.]+)\s*(?:,\s*(.*))?\}", re.DOTALL)


def reason_without_effect(key: str, value: Any, lookup: Lookup) -> str | None:
    """Return why a value of a key that is unknown here asks for nothing; None if it may ask for something.

    Args:
        key: dotted name, after `verl.config.legacy` moved it.
        lookup: returns the value of any other key in this config; see `make_lookup`.
    """
    if isinstance(value, str):
        value = _resolve(key, value, lookup)
    at_default = any(equal(value, default) for default in defaults(key, lookup))
    if at_default and key in DIFFERENT:
        return DIFFERENT[key]
    if at_default or _is_off(key, value, lookup):
        return AT_DEFAULT
    same = SAME.get(key) or SAME_SECTIONS.get(key.partition(".")[0])
    return same.why if same is not None and same.holds(value, lookup) else None


def _is_off(key: str, value: Any, lookup: Lookup) -> bool:
    """Return True if the value switches a feature off that is off by default, or if the section of the key is off."""
    known = defaults(key, lookup)
    if known and _is_among(value, _OFF) and all(_is_among(default, _OFF) for default in known):
        return True
    return any(_section_is_off(section, key, lookup) for section in _ancestors(key))


def _section_is_off(section: str, key: str, lookup: Lookup) -> bool:
    if section in _SWITCHES:
        switch, off = _SWITCHES[section]
        return switch != key and _is_among(lookup(switch), off)
    for name in ("enable", "enabled"):
        switch = f"{section}.{name}"
        # The default null of `critic.enable` switches nothing off: it means automatic.
        if switch != key and False in _defaults().get(switch, ()):
            return _is_among(lookup(switch), _OFF)
    return False


def defaults(key: str, lookup: Lookup) -> list[Any]:
    """Return the defaults of a key in upstream verl, which may depend on other keys; none for an unknown key."""
    if key in _defaults():
        return [_resolve(key, default, lookup) for default in _defaults()[key]]
    # A section whose default is another section: `rollout.mtp` is `model.mtp`.
    for section in _ancestors(key):
        for default in _defaults().get(section, ()):
            match = _INTERPOLATION.fullmatch(default) if isinstance(default, str) else None
            if match is not None:
                return [lookup(match[1] + key.removeprefix(section))]
    return []


def _resolve(key: str, default: Any, lookup: Lookup) -> Any:
    match = _INTERPOLATION.fullmatch(default) if isinstance(default, str) else None
    if match is None:
        return default
    name, otherwise = match[1], match[2]
    if name.startswith("."):
        name = key.rpartition(".")[0] + name
    value = lookup(name)
    if value is None and otherwise is not None:
        return _resolve(key, otherwise if "${" in otherwise else yaml.safe_load(otherwise), lookup)
    return value


def make_lookup(config: Any, unknown: Mapping[str, Any]) -> Lookup:
    """Return a function from a dotted key to its value: in the config, else in `unknown`, else upstream's default."""

    def lookup(key: str) -> Any:
        if key in unknown:
            return unknown[key]
        try:
            return functools.reduce(lambda owner, name: owner[name], key.split("."), config)
        except (KeyError, TypeError):
            found = defaults(key, lookup)
            return found[0] if found else None

    return lookup


def feature_hint(key: str, known: Collection[str], sections: Collection[str]) -> str | None:
    """Return the error text for a key of upstream verl without a counterpart here; None for any other key.

    Args:
        key: dotted name that is unknown here.
        known, sections: names of all keys and sections here.
    """
    table = _defaults()
    outer = [section for section in _ancestors(key) if section not in sections and not _is_below(section, known)]
    if outer and any(name.startswith(f"{outer[-1]}.") for name in table):
        return f"unknown keys '{outer[-1]}.*'; a feature of upstream verl that is not supported; leave them out"
    if key not in table:
        return None
    default = table[key][0]
    match = _INTERPOLATION.fullmatch(default) if isinstance(default, str) else None
    if match is not None and match[1] in known:
        return f"unknown key '{key}'; use {match[1]}"
    way_out = "leave it out" if match is not None else f"use {show(default)}, or leave it out"
    return f"unknown key '{key}'; a feature of upstream verl that is not supported; {way_out}"


def _is_below(section: str, known: Collection[str]) -> bool:
    """Return True for an entry of a key whose value is a mapping."""
    return any(ancestor in known for ancestor in (section, *_ancestors(section)))


def has_default(key: str, value: Any) -> bool:
    """Return True if a key, by its current name or an old one, has this default in upstream verl."""
    return any(equal(value, default) for default in _defaults().get(key, ()))


def at_default(key: str, value: Any) -> bool:
    """Return True if a key that moved has a default of upstream verl, by its old name."""
    return any(equal(value, default) for default in _raw_defaults().get(key, ()))


def notes(reasons: Mapping[str, str]) -> list[str]:
    """Return one note per reason.

    Args:
        reasons: results of `reason_without_effect`, by key.
    """
    by_reason: dict[str, list[str]] = {}
    for key, reason in reasons.items():
        by_reason.setdefault(reason, []).append(key)
    found = []
    for reason, keys in by_reason.items():
        if reason == AT_DEFAULT:
            found.append(f"no effect: {len(keys)} {reason}: {', '.join(_shortened(keys))}")
        else:
            found.append(f"no effect, because {reason}: {', '.join(sorted(keys))}")
    return found


def _shortened(keys: list[str], shown: int = 12) -> Iterable[str]:
    """Yield the keys, or if they are too many to show, their sections with the number of keys in them."""
    if len(keys) <= shown:
        yield from sorted(keys)
        return
    counts: dict[str, int] = {}
    for key in sorted(keys):
        parts = key.split(".")
        section = ".".join(parts[: 2 if parts[0] == "actor_rollout_ref" else 1])
        counts[section] = counts.get(section, 0) + 1
    yield from (f"{section}.* ({count})" for section, count in counts.items())


def equal(value: Any, other: Any) -> bool:
    """Return True if two values are the same when they are written on the command line."""
    if isinstance(value, bool) or isinstance(other, bool):
        return show(value).lower() == show(other).lower()
    return bool(value == other) or show(value) == show(other)


def _is_among(value: Any, others: tuple[Any, ...]) -> bool:
    """Return True for one of `others`, without mistaking 0 for False."""
    return any(type(value) is type(other) and value == other for other in others)


def _ancestors(key: str) -> list[str]:
    """Return the sections of a key, inner sections first."""
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


@functools.cache
def _raw_defaults() -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


@functools.cache
def _defaults() -> dict[str, list[Any]]:
    """Return the defaults by current name; an old name adds its defaults to those of the current name."""
    found: dict[str, list[Any]] = {}
    for key, values in _raw_defaults().items():
        found.setdefault(legacy.current_name(key), []).extend(values)
    return found
