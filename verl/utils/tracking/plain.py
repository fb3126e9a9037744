"""Conversion to plain, finite values without secrets, for trackers."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from verl.utils.text import valid_text

MASK = "***"
# Words that make a key secret at any position, and words that do so at its end.
SECRET_WORDS = {
    *("secret", "secrets", "password", "passwd", "passphrase", "credential", "credentials", "apikey"),
    *("authorization", "bearer"),
}
SECRET_LAST_WORDS = {"key", "keys", "token", "tokens"}
# Keys that end in such a word but name a column or a symbol.
PUBLIC_KEYS = {
    *("prompt_key", "response_key", "image_key", "video_key", "audio_key", "answer_key", "reward_key"),
    *("reward_fn_key", "data_source_key", "ground_truth_key", "label_key", "tools_key", "messages_key", "teacher_key"),
    *("pad_token", "eos_token", "bos_token", "unk_token", "mask_token", "sep_token", "cls_token"),
}
URL_PASSWORD = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)(?P<user>[^/\s:@]*):[^/\s@]+@", re.IGNORECASE)


def to_plain(value: Any, lenient: bool = False) -> Any:
    """Convert to numbers, strings, lists and dicts; numpy arrays and numpy and torch scalars are converted too.

    Raises:
        TypeError: a value has no plain form, e.g. a tensor with several elements; if `lenient` it becomes its `str`.
    """
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return to_plain(value.item(), lenient)
    if isinstance(value, str):
        return valid_text(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {valid_text(str(key)): to_plain(item, lenient) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset | np.ndarray):
        return [to_plain(item, lenient) for item in value]
    if lenient:
        return valid_text(str(value))
    raise TypeError(f"value of type {type(value).__name__} is neither a number nor text: {str(value)[:80]!r}")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


def to_json(value: Any) -> str:
    """Return one line of valid JSON. NaN and infinities become null, other types their `str`."""
    return json.dumps(_finite(to_plain(value, lenient=True)), ensure_ascii=False, allow_nan=False)


def _words(key: str) -> list[str]:
    return re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", key).lower().replace("-", "_").replace(".", "_").split("_")


def _is_secret(key: str, value: Any) -> bool:
    words = _words(key)
    if SECRET_WORDS & set(words):
        return value not in (None, "")
    if words[-1] not in SECRET_LAST_WORDS or key.lower() in PUBLIC_KEYS:
        return False
    # Numbers and booleans under such names are counts and switches (max_num_batched_tokens).
    return isinstance(value, Mapping | list | tuple) or (isinstance(value, str) and value != "")


def _mask_all(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _mask_all(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mask_all(item) for item in value]
    return value if value is None or isinstance(value, bool) else MASK


def mask_secrets(config: Any) -> Any:
    """Return a copy of a config (nested dicts, lists, dataclasses) with secrets replaced by `***`.

    These are masked: values whose key names a secret, password or credential; text whose key ends in `key` or `token`
    (except `PUBLIC_KEYS`); the password of a URL. A value that is neither a number nor text becomes its `str`.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {
            str(key): _mask_all(item) if _is_secret(str(key), item) else mask_secrets(item)
            for key, item in config.items()
        }
    if isinstance(config, list | tuple):
        return [mask_secrets(item) for item in config]
    if config is None or isinstance(config, bool | int | float):
        return config
    return URL_PASSWORD.sub(rf"\g<scheme>\g<user>:{MASK}@", valid_text(str(config)))
