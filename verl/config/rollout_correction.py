"""`algorithm.rollout_correction`: its keys, its presets, and what they amount to (`resolve`)."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from verl.config.errors import ConfigError
from verl.config.schema import key, planned, show

PREFIX = "algorithm.rollout_correction."
IS_LEVELS = ("token", "sequence")
LOSS_TYPES = ("ppo_clip", "reinforce")
RS_TERMS = (
    *(f"{pooled}_{estimator}" for pooled in ("token", "seq_sum", "seq_mean") for estimator in ("k1", "k2", "k3")),
    "seq_max_k2",
    "seq_max_k3",
    "binary_kl",
)
# Terms by their names in earlier versions of verl.
_EARLIER = {"geometric": "seq_mean_k1", "sequence": "seq_sum_k1", "token": "token_k1"}


@dataclass
class RolloutCorrectionConfig:
    """Importance weights and rejection between rollout and trainer."""

    preset: str | None = key(None, "fills the other keys: decoupled_token_is, bypass_ppo_clip, ...; null for none")
    rollout_is: str | None = key(None, "importance weights: token, sequence, or null for none")
    rollout_is_threshold: float | str = key(
        2.0, "a number: larger weights are cut to it; a band such as '0.5_5.0': weights outside become 0"
    )
    rollout_is_batch_normalize: bool = key(False, "divide the weights by their mean over the batch")
    rollout_rs: str | None = key(
        None, "rejection: seq_mean_k1, token_k3, ...; several with commas, which all have to keep; null for none"
    )
    rollout_rs_threshold: float | str | None = key(
        None,
        "k1: a band of the ratio such as '0.5_2.0', or x for 1/x to x; k2, k3: the largest value; with commas each",
    )
    bypass_mode: bool = key(False, "take the rollout's log-probabilities for old_log_probs, and loss_type for the loss")
    loss_type: str = key("ppo_clip", "loss in bypass_mode: ppo_clip or reinforce")
    debug_rollout_actor_probs: bool = planned(False, "a forward pass for metrics alone in bypass_mode")


@dataclass(frozen=True)
class Band:
    """From `lo` to `hi`, both included."""

    lo: float
    hi: float


@dataclass(frozen=True)
class Rejection:
    """One term of `rollout_rs`.

    Attributes:
        term: one of `RS_TERMS`.
        band: k1: of the ratio pi/mu; others: of the divergence, which is never negative, so that `lo` is 0.
    """

    term: str
    band: Band

    @property
    def estimator(self) -> str:
        """k1, k2, k3, or binary_kl."""
        return self.term if self.term == "binary_kl" else self.term[-2:]

    @property
    def pooling(self) -> str | None:
        """How a sequence's tokens become one value: sum, mean or max; None where each token is judged by itself."""
        return self.term.split("_")[1] if self.term.startswith("seq_") else None


@dataclass(frozen=True)
class Correction:
    """What `RolloutCorrectionConfig` amounts to.

    Attributes:
        rollout_is: `token`, `sequence`, or None for no weights.
        rollout_is_band: bounds of the weights; for a single number C from 1/C to C.
        rollout_is_zero: weights outside the band become 0; otherwise those above it are cut to its upper bound.
        rollout_is_batch_normalize: divide the bounded weights by their mean.
        rejections: every one of them has to keep a token.
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
        """Whether anything is weighted or rejected."""
        return self.rollout_is is not None or bool(self.rejections)


_GEO = {"rollout_rs": "seq_mean_k1", "rollout_rs_threshold": "0.999_1.001"}
_K3 = {"rollout_rs": "seq_mean_k3", "rollout_rs_threshold": 0.01}
_TOKEN = {"rollout_is": "token", "rollout_is_threshold": 2.0}
_SEQUENCE = {"rollout_is": "sequence", "rollout_is_threshold": 2.0}
_ICEPOP = {"rollout_is": "token", "rollout_is_threshold": "0.5_5.0"}
_CLIP = {"bypass_mode": True, "loss_type": "ppo_clip"}
_PG = {"bypass_mode": True, "loss_type": "reinforce"}
# Keys that a preset leaves out have their defaults.
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
    """The config with its preset filled in and its thresholds parsed.

    Raises:
        ConfigError: a ValueError that lists every problem: field, value, what to do.
    """
    problems: list[str] = []
    config = _with_preset(config, problems)
    for name, known in (("rollout_is", (*IS_LEVELS, None)), ("loss_type", LOSS_TYPES)):
        value = getattr(config, name)
        if value not in known:
            problems.append(f"{PREFIX}{name}={show(value)}: {_unknown(value, known)}")
    band, zero = _weight_band(config.rollout_is_threshold, problems)
    rejections = _rejections(config, problems)
    if problems:
        raise ConfigError(problems)
    return Correction(
        rollout_is=config.rollout_is,
        rollout_is_band=band,
        rollout_is_zero=zero,
        rollout_is_batch_normalize=config.rollout_is_batch_normalize,
        rejections=rejections,
        bypass_mode=config.bypass_mode,
        loss_type=config.loss_type,
    )


def _with_preset(config: RolloutCorrectionConfig, problems: list[str]) -> RolloutCorrectionConfig:
    """A key at its default cannot be told here from one that was not given: the preset decides it."""
    if config.preset is None:
        return config
    if config.preset not in PRESETS:
        problems.append(f"{PREFIX}preset={config.preset}: {_unknown(config.preset, (*PRESETS, None))}")
        return config
    defaults = RolloutCorrectionConfig()
    changed = [name for name in _names() if not _same(getattr(config, name), getattr(defaults, name))]
    problems += contradictions(config, [PREFIX + name for name in changed])
    return dataclasses.replace(defaults, **PRESETS[config.preset])


def contradictions(config: RolloutCorrectionConfig, given: Collection[str]) -> list[str]:
    """What the preset says otherwise of the keys that were `given` (dotted names), one line a key."""
    if config.preset not in PRESETS:
        return []
    filled = dataclasses.replace(RolloutCorrectionConfig(), **PRESETS[config.preset])
    return [
        f"{PREFIX}{name}={show(getattr(config, name))}: {PREFIX}preset={config.preset} says "
        f"{show(getattr(filled, name))}; leave one of the two out"
        for name in _names()
        if PREFIX + name in given and not _same(getattr(config, name), getattr(filled, name))
    ]


def _names() -> list[str]:
    return [field.name for field in dataclasses.fields(RolloutCorrectionConfig) if field.name != "preset"]


def _same(a: Any, b: Any) -> bool:
    return bool(_comparable(a) == _comparable(b))


def _comparable(value: Any) -> Any:
    """2.0 and "2", "0.5_5" and "0.5_5.0" are the same threshold."""
    try:
        return [[float(number) for number in text.split("_")] for text in str(value).split(",")]
    except ValueError:
        return value


def _weight_band(value: float | str, problems: list[str]) -> tuple[Band, bool]:
    """The bounds, and whether weights outside become 0."""
    name = f"{PREFIX}rollout_is_threshold"
    try:
        numbers = _numbers(value)
        if len(numbers) == 2:
            return _ratio_band(numbers), True
        if numbers[0] < 1:
            raise ValueError("is below 1, the weight where the two policies agree; use 2.0" + _merged(numbers[0]))
        return Band(1 / numbers[0], numbers[0]), False
    except ValueError as error:
        problems.append(f"{name}={show(value)}: {error}")
        return Band(0.5, 2.0), False


def _rejections(config: RolloutCorrectionConfig, problems: list[str]) -> tuple[Rejection, ...]:
    rs, thresholds = f"{PREFIX}rollout_rs", f"{PREFIX}rollout_rs_threshold"
    given = config.rollout_rs_threshold
    if config.rollout_rs is None:
        if given is not None:
            problems.append(f"{thresholds}={show(given)}: there is no {rs} that it belongs to; set {rs}=seq_mean_k1")
        return ()
    texts = [text.strip() for text in config.rollout_rs.split(",")]
    terms = list(dict.fromkeys(text for text in texts if text)) or [config.rollout_rs]
    unknown = [term for term in terms if term not in RS_TERMS]
    problems += [f"{rs}={config.rollout_rs}: {_unknown(term, (*RS_TERMS, None))}" for term in unknown]
    if unknown:
        return ()
    if given is None:
        problems.append(
            f"{thresholds} is not set: {rs}={config.rollout_rs} needs one for each term, with commas between"
        )
        return ()
    texts = [text.strip() for text in str(given).split(",")]
    if len(texts) not in (1, len(terms)):
        problems.append(
            f"{thresholds}={given}: {len(texts)} thresholds for {len(terms)} terms ({rs}={','.join(terms)}); give one "
            "for each, or one for all"
        )
        return ()
    found = []
    for term, text in zip(terms, texts if len(texts) > 1 else texts * len(terms), strict=True):
        try:
            found.append(Rejection(term, _rejection_band(term, text)))
        except ValueError as error:
            problems.append(f"{thresholds}={given}: {text} for {term} {error}")
    return tuple(found)


def _rejection_band(term: str, text: str) -> Band:
    numbers = _numbers(text)
    if not term.endswith("k1"):
        if len(numbers) == 2:
            raise ValueError("has two bounds, and a divergence only has a largest value; give one number, as 0.01")
        return Band(0.0, numbers[0])
    if len(numbers) == 2:
        return _ratio_band(numbers)
    if numbers[0] <= 1:
        raise ValueError("has to be above 1: x stands for the band from 1/x to x" + _merged(numbers[0]))
    return Band(1 / numbers[0], numbers[0])


def _numbers(value: float | str) -> list[float]:
    """One number or the two of "lo_hi", positive."""
    texts = str(value).split("_")
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(math.isfinite(number) for number in numbers):
        raise ValueError("is no number and no band; give 2.0, or a band such as 0.5_5.0")
    if min(numbers) <= 0:
        raise ValueError("has to be above 0; give 2.0, or a band such as 0.5_5.0")
    return numbers


def _ratio_band(numbers: list[float]) -> Band:
    lo, hi = numbers
    if lo > hi:
        raise ValueError(f"is the wrong way round; use {hi}_{lo}")
    if not lo <= 1 <= hi or lo == hi:
        raise ValueError("does not hold 1, the ratio where the two policies agree; use a band such as 0.5_2.0")
    return Band(lo, hi)


def _merged(number: float) -> str:
    """Below 1, a number is most likely a band that YAML has read as one number."""
    return "; a band needs a point in its second number, 0.5_5.0, since YAML reads 0.5_5 as 0.55" if number < 1 else ""


def _unknown(value: Any, known: tuple[Any, ...]) -> str:
    names = [show(name) for name in known]
    earlier = [_EARLIER[value]] if value in _EARLIER and _EARLIER[value] in known else []
    near = earlier or difflib.get_close_matches(str(value), names, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"{show(value)} is unknown{hint}; use one of {', '.join(names)}"
