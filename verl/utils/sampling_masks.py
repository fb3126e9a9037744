"""Sampling masks: the tokens from which a truncated sampler (top-p, top-k, min-p) chose each response token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# The column of a batch: object array [B] of `SamplingMasks`, one for each sample.
COLUMN = "sampling_masks"


def candidates_for_top_k(top_k: int) -> int:
    """Return the number of the most likely tokens among which a sampler with `top_k` finds the tokens that it keeps.

    Tokens with the same logit as the last of the k tokens are kept too, and in bfloat16 equal logits are common.
    """
    return top_k + top_k // 2 + 16


@dataclass(frozen=True, eq=False)
class SamplingMasks:
    """The kept tokens of T response tokens, as one list of token ids with a count per response token.

    Attributes:
        ids: [M] int32, the kept token ids of the first response token, then those of the second, and so on.
        counts: [T] int32, number of kept tokens; 0 without a mask: the token was sampled from the whole vocabulary, or
            the model did not generate it.
    """

    ids: np.ndarray
    counts: np.ndarray

    @classmethod
    def full(cls, num_tokens: int) -> SamplingMasks:
        """Return masks of `num_tokens` tokens that were not sampled from a part of the vocabulary."""
        return cls(np.empty(0, np.int32), np.zeros(num_tokens, np.int32))

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, part: slice) -> SamplingMasks:
        """Return the masks of consecutive tokens."""
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError(f"a slice of sampling masks with step {step}: only consecutive tokens can be selected")
        counts = self.counts[start:stop]
        first = int(self.counts[:start].sum())
        return SamplingMasks(self.ids[first : first + int(counts.sum())], counts)

    def __add__(self, other: SamplingMasks) -> SamplingMasks:
        return SamplingMasks(np.concatenate([self.ids, other.ids]), np.concatenate([self.counts, other.counts]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SamplingMasks):
            return NotImplemented
        return np.array_equal(self.ids, other.ids) and np.array_equal(self.counts, other.counts)

    def excluded(self, token_ids: np.ndarray) -> np.ndarray:
        """Return the indices of the tokens that have a mask without themselves; a sampler cannot choose these.

        Args:
            token_ids: [T] the response tokens.
        """
        index = np.repeat(np.arange(len(self)), self.counts)
        kept = self.counts == 0
        kept[index[self.ids == token_ids[index]]] = True
        return np.flatnonzero(~kept)
