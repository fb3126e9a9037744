"""Cases of config keys: for each key values of wrong types, out of bounds, not finite, too long, and unknown paths."""

from __future__ import annotations

import dataclasses
import functools
import random
import re
import typing
from collections.abc import Iterator
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from campaign import legality
from campaign.cases import Case
from campaign.sandbox import overrides
from verl.config import PPOConfig
from verl.config.build import key_types
from verl.config.schema import Key, key_of, show, walk

_NUMBERS = ("zero", "negative", "fractional", "huge", "digits", "nan", "inf")
_TEXTS = ("text", "empty", "markup", "interpolation")
_OTHERS = ("list", "empty-list", "list-of-nan", "mapping", "empty-mapping", "null", "true", "false")
_PATHS = ("unknown-path", "unknown-user", "long-path", "long-name", "file-as-directory", "directory")
KINDS = (*_NUMBERS, *_TEXTS, *_OTHERS, *_PATHS)
PER_KEY, PER_UNSUPPORTED_KEY = 5, 2
"""Values for each key, by chance: most of them suit its type, such as numbers for a number."""

# Sections that have an effect only with other keys. The first prefix of a key's name counts.
_SWITCHES = {
    "critic.": {"algorithm__adv_estimator": "gae", "critic__model__path": "{root}/model"},
    "actor_rollout_ref.ref.": {"actor_rollout_ref__actor__use_kl_loss": True},
    "async_training.": {
        "async_training__enable": True,
        "data__train_batch_size": 16,
        "actor_rollout_ref__rollout__nnodes": 1,
        "actor_rollout_ref__rollout__n_gpus_per_node": 1,
    },
    "algorithm.kl_ctrl.": {"algorithm__use_kl_in_reward": True},
}
# Every fortieth case composes as a user's command does.
_COMPOSED = 40
# Longer values are cut off in errors.
_SHOWN = 40


def cases(seed: int, per_key: int = PER_KEY) -> Iterator[Case]:
    """Yield the cases of all keys.

    Args:
        per_key: values for each key; a key of an unsupported feature gets `PER_UNSUPPORTED_KEY` at most.
    """
    yield from _unchanged()
    hints = key_types(PPOConfig)
    for name, field, _ in walk(PPOConfig()):
        known, hint = key_of(field), hints[name]
        for kind in _kinds(seed, name, known, hint, per_key):
            yield _case(seed, name, kind, known, hint)


def all_cases(seed: int) -> Iterator[Case]:
    """Yield every value of every key, for `--only`."""
    yield from _unchanged()
    hints = key_types(PPOConfig)
    for name, field, _ in walk(PPOConfig()):
        yield from (_case(seed, name, kind, key_of(field), hints[name]) for kind in KINDS)


def _unchanged() -> Iterator[Case]:
    """Yield the configs that the values of the other cases change."""
    for prefix, changes in {"": {}, **_SWITCHES}.items():
        words = ("train", *overrides(**changes))
        yield Case(f"config/{prefix or 'run.'}unchanged", "config: unchanged", words, (), must_accept=True)


def _kinds(seed: int, name: str, known: Key, hint: Any, per_key: int) -> list[str]:
    """Return the kinds of values for a key: first those of its type."""
    chance = random.Random(f"{seed}/{name}")
    count = per_key if known.only is None else min(per_key, PER_UNSUPPORTED_KEY)
    first = list(_PATHS if known.path else _NUMBERS if {int, float} & set(_parts(hint)) else ())
    chance.shuffle(first)
    others = [kind for kind in KINDS if kind not in first]
    chance.shuffle(others)
    # At least two of another type than the key's.
    chosen = [*first[: max(1, count - 2)], *others][:count]
    return [kind for kind in KINDS if kind in chosen]


def _parts(hint: Any) -> Iterator[Any]:
    arguments = typing.get_args(hint)
    yield from (part for argument in arguments for part in _parts(argument)) if arguments else (hint,)


def _case(seed: int, name: str, kind: str, known: Key, hint: Any) -> Case:
    case_name = f"config/{name}/{kind}"
    chance = random.Random(f"{seed}/{case_name}")
    raw = _raw(kind, chance)
    changes = next((more for prefix, more in _SWITCHES.items() if name.startswith(prefix)), {})
    words = [word for word in overrides(**changes) if not word.startswith(f"{name}=")]
    return Case(
        case_name,
        f"config: {_AREAS.get(kind, kind)}",
        ("train", *words, f"{name}={raw}"),
        ((name,),),
        why_unnamed=functools.partial(_why_unnamed, kind, raw),
        why_illegal=functools.partial(_why_illegal, name, known, hint, raw),
        composes=chance.randrange(_COMPOSED) == 0,
    )


_AREAS = {
    **dict.fromkeys(("zero", "negative", "fractional"), "zero, negative, fractional"),
    **dict.fromkeys(("huge", "digits"), "huge numbers"),
    **dict.fromkeys(("nan", "inf"), "NaN, infinite"),
    **dict.fromkeys(_TEXTS, "text, empty text"),
    **dict.fromkeys(("list", "empty-list", "list-of-nan", "mapping", "empty-mapping"), "lists, mappings"),
    **dict.fromkeys(("null", "true", "false"), "null, truth values"),
    **dict.fromkeys(_PATHS, "paths"),
}


def _raw(kind: str, chance: random.Random) -> str:
    """Return a value as Hydra's command line has it."""
    word = "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=8))
    values = {
        "zero": "0",
        "negative": str(-chance.randint(1, 10 ** chance.randint(1, 9))),
        "fractional": f"{chance.randint(0, 9)}.{chance.randint(1, 9)}",
        "huge": chance.choice([str(2**31), str(10**18), str(-(2**63) - 1), "1.0e308", "-1.0e308", "1.0e400"]),
        "digits": "9" * 5000,
        "nan": chance.choice(["nan", "-nan", ".nan", "NaN"]),
        "inf": chance.choice(["inf", "-inf", ".inf", "Infinity"]),
        "text": word,
        "empty": chance.choice(["", "''", "' '"]),
        "markup": f"'[bold]{word}[/] %s {{}} \\n'",
        "interpolation": chance.choice([f"${{{word}}}", "${oc.env:NO_SUCH_VARIABLE_HERE}", f"'{word}${{'"]),
        "list": f"[1,{word},null]",
        "empty-list": "[]",
        "list-of-nan": "[nan,1]",
        "mapping": f"{{{word}:1}}",
        "empty-mapping": "{}",
        "null": "null",
        "true": "true",
        "false": "False",
        "unknown-path": f"/no/such/{word}",
        "unknown-user": f"~{word}/{word}",
        "long-path": "/" + "/".join([word] * 600),
        "long-name": f"/tmp/{word * 40}",
        "file-as-directory": "{root}/train.parquet/" + word,
        "directory": "{root}/work",
    }
    return values[kind]


def _why_unnamed(kind: str, raw: str, output: str) -> str | None:
    """Return why an error does not name the value, by any of its spellings; None if it does, or if there is none."""
    if kind in ("empty", "empty-list", "empty-mapping", "null"):
        return None
    plain = raw.removeprefix("{root}").strip("'")
    spellings = [plain, show(_value(raw))]
    if kind in ("unknown-user", "markup", "interpolation", "mapping"):  # shown in quotes, or as another text
        spellings.append(max(re.findall("[a-z]{8}|NO_SUCH_VARIABLE_HERE", raw), key=len, default=plain))
    if kind in ("list", "list-of-nan"):  # an error may name the wrong item only
        spellings += [f"{before}{item}" for item in raw[1:-1].split(",") for before in ("=", ": ")]
    shortened = [spelling[:_SHOWN] for spelling in spellings]
    return None if any(text in output for text in shortened) else f"the error does not contain {shortened[0]!r}"


def _value(raw: str) -> Any:
    """Return the value that Hydra reads; the text itself where it cannot read it."""
    try:
        value = OverridesParser.create().parse_override(f"key={raw!r}" if raw.startswith("~") else f"key={raw}").value()
    except Exception:  # noqa: BLE001  (the parser of Hydra raises errors of several libraries)
        return raw
    return str(value) if dataclasses.is_dataclass(value) or type(value).__name__ == "QuotedString" else value


def _why_illegal(name: str, known: Key, hint: Any, raw: str, output: str) -> str | None:
    value = _value(raw)
    if isinstance(value, str) and "${" in value:
        return None  # the value that it stands for decides
    return legality.why_illegal(name, known, hint, value, output)
