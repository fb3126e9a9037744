"""`algorithm.rollout_correction`: its keys, its presets, and `resolve`, which turns both into a `Correction`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from verl.config.conditions import unless, when
from verl.config.errors import ConfigError, unknown_value
from verl.config.schema import ConfigSection, key, show, unsupported

PREFIX = "algorithm.rollout_correction."
IS_LEVELS = ("token", "sequence")
LOSS_TYPES = ("ppo_clip", "reinforce")
RS_TERMS = (
    *(f"{pooled}_{estimator}" for pooled in ("token", "seq_sum", "seq_mean") for estimator in ("k1", "k2", "k3")),
    "seq_max_k2",
    "seq_max_k3",
    "binary_kl",
)
# Names of terms in earlier versions of upstream verl.
_EARLIER_TERMS = {"geometric": "seq_mean_k1", "sequence": "seq_sum_k1", "token": "token_k1"}
_WITH_WEIGHTS = unless("run.correction.rollout_is", None, reason="with algorithm.rollout_correction.rollout_is=null")


@dataclass
class RolloutCorrectionConfig(ConfigSection):
    """Importance weights and rejection that correct differences of rollout and trainer."""

    preset: str | None = key(
        None, "named values for the other keys: decoupled_token_is, bypass_ppo_clip, ...; null: no preset"
    )
    rollout_is: str | None = key(None, "importance weights: per token, per sequence, or null: no weights")
    rollout_is_threshold: float | str | None = key(
        2.0,
        "bounds of the weights; a number: larger weights are truncated to it; a band such as '0.5_5.0': weights "
        "outside become 0; null only without weights",
        only_with=_WITH_WEIGHTS,
    )
    rollout_is_batch_normalize: bool = key(
        False, "divide the weights by their mean over the batch", only_with=_WITH_WEIGHTS
    )
    rollout_rs: str | None = key(
        None,
        "rejection: a term such as seq_mean_k1 or token_k3, or several with commas; a token is kept if all terms keep "
        "it; null: no rejection",
    )
    rollout_rs_threshold: float | str | None = key(
        None,
        "threshold of each term, with commas; k1: a band of the ratio such as '0.5_2.0', or x for 1/x to x; "
        "k2, k3: the maximum value",
    )
    bypass_mode: bool = key(
        False, "use the rollout's log-probabilities as old_log_probs, and the loss that loss_type chooses"
    )
    loss_type: str = key(
        "ppo_clip",
        "loss in bypass mode: ppo_clip or reinforce",
        only_with=when("run.correction.bypass_mode", reason="with algorithm.rollout_correction.bypass_mode=False"),
    )
    debug_rollout_actor_probs: bool = unsupported(False, "a forward pass for metrics only in bypass mode")


@dataclass(frozen=True)
class Band:
    """An interval from `lo` to `hi`, both included."""

    lo: float
    hi: float


@dataclass(frozen=True)
class Rejection:
    """One term of `rollout_rs`.

    Attributes:
        term: one of `RS_TERMS`.
        band: values that are kept. k1: of the ratio pi/mu; other estimators: of the divergence, with `lo` = 0, because
            a divergence is never negative.
    """

    term: str
    band: Band

    @property
    def estimator(self) -> str:
        """k1, k2, k3, or binary_kl."""
        return self.term if self.term == "binary_kl" else self.term[-2:]

    @property
    def pooling(self) -> str | None:
        """Reduction of a sequence's tokens to one value: sum, mean or max; None if each token has its own value."""
        return self.term.split("_")[1] if self.term.startswith("seq_") else None


@dataclass(frozen=True)
class Correction(ConfigSection):
    """A `RolloutCorrectionConfig` with its preset filled in and its thresholds parsed.

    Attributes:
        rollout_is: `token`, `sequence`, or None for no weights.
        rollout_is_band: bounds of the weights; a single number C gives 1/C to C.
        rollout_is_zero: True: weights outside the band become 0; False: weights above it are truncated.
        rollout_is_batch_normalize: divide the bounded weights by their mean.
        rejections: terms of the rejection; a token is kept if all of them keep it.
        bypass_mode, loss_type: as in the config.
    """

    rollout_is: str | None = None
    rollout_is_band: Band = Band(0.5, 2.0)
    rollout_is_zero: bool = False
    rollout_is_batch_normalize: bool = False
    rejections: tuple[Rejection, ...] = ()
    bypass_mode: bool = False
    loss_type: str = "ppo_clip"

    @property
    def active(self) -> bool:
        """True if there are weights or rejections."""
        return self.rollout_is is not None or bool(self.rejections)


_GEO = {"rollout_rs": "seq_mean_k1", "rollout_rs_threshold": "0.999_1.001"}
_K3 = {"rollout_rs": "seq_mean_k3", "rollout_rs_threshold": 0.01}
_TOKEN = {"rollout_is": "token", "rollout_is_threshold": 2.0}
_SEQUENCE = {"rollout_is": "sequence", "rollout_is_threshold": 2.0}
_ICEPOP = {"rollout_is": "token", "rollout_is_threshold": "0.5_5.0"}
_CLIP = {"bypass_mode": True, "loss_type": "ppo_clip"}
_PG = {"bypass_mode": True, "loss_type": "reinforce"}
# A key that a preset does not contain has its default.
PRESETS: dict[str, dict[str, Any]] = {
    "disabled": {},
    "decoupled_token_is": _TOKEN,
    "decoupled_seq_is": _SEQUENCE,
    "decoupled_token_icepop": _ICEPOP,
    "decoupled_seq_is_rs": {**_SEQUENCE, "rollout_rs": "seq_sum_k1", "rollout_rs_threshold": "0.5_2.0"},
    "decoupled_geo_rs": _GEO,
    "decoupled_geo_rs_seq_tis": {**_GEO, **_SEQUENCE},
    "decoupled_geo_rs_token_tis": {**_GEO, **_TOKEN},
    "decoupled_k3_rs": _K3,
    "decoupled_k3_rs_seq_tis": {**_K3, **_SEQUENCE},
    "decoupled_k3_rs_token_tis": {**_K3, **_TOKEN},
    "bypass_ppo_clip": _CLIP,
    "bypass_ppo_clip_geo_rs": {**_CLIP, **_GEO},
    "bypass_ppo_clip_k3_rs": {**_CLIP, **_K3},
    "bypass_pg_is": {**_PG, **_SEQUENCE},
    "bypass_pg_token_icepop": {**_PG, **_ICEPOP},
    "bypass_pg_geo_rs": {**_PG, **_GEO},
    "bypass_pg_geo_rs_seq_tis": {**_PG, **_GEO, **_SEQUENCE},
    "bypass_pg_geo_rs_token_tis": {**_PG, **_GEO, **_TOKEN},
}


def resolve(config: RolloutCorrectionConfig) -> Correction:
    """Return the config with its preset filled in and its thresholds parsed.

    Raises:
        ConfigError: lists every problem.
    """
    problems: list[str] = []
    config = _fill_preset(config, problems)
    for name, known in (("rollout_is", (*IS_LEVELS, None)), ("loss_type", LOSS_TYPES)):
        value = getattr(config, name)
        if value not in known:
            problems.append(f"{PREFIX}{name}={show(value)}: {unknown_value(value, known)}")
    threshold = config.rollout_is_threshold
    if threshold is None and config.rollout_is is None:
        threshold = RolloutCorrectionConfig.rollout_is_threshold
    weight_band, zero = _weight_band(threshold, problems)
    rejections = _rejections(config, problems)
    if problems:
        raise ConfigError(problems)
    return Correction(
        rollout_is=config.rollout_is,
        rollout_is_band=weight_band,
        rollout_is_zero=zero,
        rollout_is_batch_normalize=config.rollout_is_batch_normalize,
        rejections=rejections,
        bypass_mode=config.bypass_mode,
        loss_type=config.loss_type,
    )


def contradictions(config: RolloutCorrectionConfig, given: Collection[str]) -> dict[str, str]:
    """Return an error text for each key in `given` (dotted names) whose value differs from the preset's value."""
    if config.preset not in PRESETS:
        return {}
    preset = _preset_config(config.preset)
    return {
        PREFIX + name: f"{PREFIX}{name}={show(getattr(config, name))}: {PREFIX}preset={config.preset} sets "
        f"{show(getattr(preset, name))}; leave one of the two out"
        for name in _keys_of_presets()
        if PREFIX + name in given and not _same(getattr(config, name), getattr(preset, name))
    }


def _fill_preset(config: RolloutCorrectionConfig, problems: list[str]) -> RolloutCorrectionConfig:
    """Return the values of the preset, or the config itself without a (known) preset.

    A key with its default value may have been omitted, so only other values can contradict the preset.
    """
    if config.preset is None:
        return config
    if config.preset not in PRESETS:
        problems.append(f"{PREFIX}preset={config.preset}: {unknown_value(config.preset, (*PRESETS, None))}")
        return config
    defaults = RolloutCorrectionConfig()
    changed = [name for name in _keys_of_presets() if not _same(getattr(config, name), getattr(defaults, name))]
    problems += contradictions(config, [PREFIX + name for name in changed]).values()
    return _preset_config(config.preset)


def _preset_config(preset: str) -> RolloutCorrectionConfig:
    return dataclasses.replace(RolloutCorrectionConfig(), **PRESETS[preset])


def _keys_of_presets() -> list[str]:
    return [field.name for field in dataclasses.fields(RolloutCorrectionConfig) if field.name != "preset"]


def _same(a: Any, b: Any) -> bool:
    """Compare two values; 2.0 and "2", or "0.5_5" and "0.5_5.0", are the same threshold."""
    return bool(_comparable(a) == _comparable(b))


def _comparable(value: Any) -> Any:
    try:
        return [[float(number) for number in text.split("_")] for text in str(value).split(",")]
    except ValueError:
        return value


def _weight_band(threshold: float | str | None, problems: list[str]) -> tuple[Band, bool]:
    """Return the bounds of the weights, and True if weights outside become 0."""
    try:
        if threshold is None:
            raise ValueError("importance weights need a bound; use 2.0")
        numbers = _numbers(threshold)
        if len(numbers) == 2:
            return _ratio_band(*numbers), True
        if numbers[0] < 1:
            raise ValueError(
                "must be at least 1, which is the weight if both policies agree; use 2.0" + _band_hint(numbers[0])
            )
        return Band(1 / numbers[0], numbers[0]), False
    except ValueError as error:
        problems.append(f"{PREFIX}rollout_is_threshold={show(threshold)}: {error}")
        return Band(0.5, 2.0), False


def _rejections(config: RolloutCorrectionConfig, problems: list[str]) -> tuple[Rejection, ...]:
    terms_key, thresholds_key = f"{PREFIX}rollout_rs", f"{PREFIX}rollout_rs_threshold"
    given = config.rollout_rs_threshold
    if config.rollout_rs is None:
        if given is not None:
            problems.append(f"{thresholds_key}={show(given)}: requires {terms_key}; set {terms_key}=seq_mean_k1")
        return ()
    terms = list(dict.fromkeys(term for term in _split(config.rollout_rs) if term)) or [config.rollout_rs]
    unknown = [term for term in terms if term not in RS_TERMS]
    if unknown:
        problems += [f"{terms_key}={config.rollout_rs}: {_unknown_term(term)}" for term in unknown]
        return ()
    if given is None:
        problems.append(
            f"{thresholds_key} is not set: {terms_key}={config.rollout_rs} needs one threshold per term, with commas"
        )
        return ()
    thresholds = _split(str(given))
    if len(thresholds) not in (1, len(terms)):
        problems.append(
            f"{thresholds_key}={given}: {len(thresholds)} thresholds for {len(terms)} terms "
            f"({terms_key}={','.join(terms)}); give one for each, or one for all"
        )
        return ()
    rejections = []
    for term, threshold in zip(terms, thresholds if len(thresholds) > 1 else thresholds * len(terms), strict=True):
        try:
            rejections.append(Rejection(term, _rejection_band(term, threshold)))
        except ValueError as error:
            problems.append(f"{thresholds_key}={given}: {threshold} for {term} {error}")
    return tuple(rejections)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _unknown_term(term: str) -> str:
    if term in _EARLIER_TERMS:
        return f"{term} is unknown (did you mean {_EARLIER_TERMS[term]}?); use one of {', '.join(RS_TERMS)}, null"
    return unknown_value(term, (*RS_TERMS, None))


def _rejection_band(term: str, threshold: str) -> Band:
    numbers = _numbers(threshold)
    if not term.endswith("k1"):
        if len(numbers) == 2:
            raise ValueError("has two bounds, but a divergence only has a maximum; give one number, such as 0.01")
        return Band(0.0, numbers[0])
    if len(numbers) == 2:
        return _ratio_band(*numbers)
    if numbers[0] <= 1:
        raise ValueError("must be above 1: x means the band from 1/x to x" + _band_hint(numbers[0]))
    return Band(1 / numbers[0], numbers[0])


def _numbers(threshold: float | str) -> list[float]:
    """Return one positive number, or the two of a band "lo_hi"."""
    try:
        numbers = [float(text) for text in str(threshold).split("_")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(math.isfinite(number) for number in numbers):
        raise ValueError("must be a number or a band; give 2.0, or a band such as 0.5_5.0")
    if min(numbers) <= 0:
        raise ValueError("must be above 0; give 2.0, or a band such as 0.5_5.0")
    return numbers


def _ratio_band(lo: float, hi: float) -> Band:
    if lo > hi:
        raise ValueError(f"has its bounds in the wrong order; use {hi}_{lo}")
    if not lo <= 1 <= hi or lo == hi:
        raise ValueError("must contain 1, which is the ratio if both policies agree; use a band such as 0.5_2.0")
    return Band(lo, hi)


def _band_hint(number: float) -> str:
    """Return a hint for a number below 1, which is probably a band that YAML read as a number."""
    if number >= 1:
        return ""
    return "; a band needs a decimal point in its second number, as in 0.5_5.0, because YAML reads 0.5_5 as 0.55"
