"""Text of token ids that a model sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def decode(tokenizer: Any, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    """Return the text of token ids; ids that the tokenizer lacks have no text.

    A model may have more rows in its embedding than the tokenizer has tokens, and such a row can be sampled. Fast
    tokenizers skip these ids, and tokenizers in Python raise errors of any type.
    """
    try:
        return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    except Exception:
        known = set(tokenizer.get_vocab().values())
        kept = [token for token in ids if token in known]
        if len(kept) == len(ids):
            raise
        return tokenizer.decode(kept, skip_special_tokens=skip_special_tokens)
