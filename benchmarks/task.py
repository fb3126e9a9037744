"""The task of the benchmarks' runs: prompts that say how long their answers are, so that lengths are the same for all.

A model with random weights ends its answers anywhere. Here the first two tokens of a prompt are a number in base 100,
the length of its answer in tokens, and whatever generates keeps to it. Prompts and answers are words `w3`, `w4`, ...,
one token each, the word's number being its token. Standard library only: the peer's environment imports it too.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

FIRST_WORD = 3
_BASE = 100


def spread(count: int, shortest: int, longest: int) -> list[int]:
    """Return `count` evenly spaced lengths from `shortest` to `longest` tokens."""
    if count == 1:
        return [longest]
    return [shortest + round(i * (longest - shortest) / (count - 1)) for i in range(count)]


def make_prompts(steps: int, lengths: Sequence[int], tokens: int, seed: int = 0) -> list[str]:
    """For each step one prompt of `tokens` words for each length, in random order."""
    generator = random.Random(seed)
    prompts = []
    for _ in range(steps):
        for length in generator.sample(lengths, len(lengths)):
            numbers = [*divmod(length, _BASE), *(generator.randrange(_BASE) for _ in range(tokens - 2))]
            prompts.append(" ".join(f"w{FIRST_WORD + number}" for number in numbers))
    return prompts


def answer_length(prompt_ids: Sequence[int]) -> int:
    """Tokens of the answer to a prompt."""
    return (prompt_ids[0] - FIRST_WORD) * _BASE + prompt_ids[1] - FIRST_WORD


def score(answer: str) -> float:
    """A reward that costs next to nothing and differs among samples: the share of even words."""
    words = answer.split()
    return sum(word[-1] in "02468" for word in words) / max(1, len(words))


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> float:
    """`score` as a reward function of verl's."""
    return score(solution_str)
