"""Task of the benchmarks' runs: each prompt encodes the length of its response, so that all sides generate as much.

A model with random weights ends its responses anywhere. Here the first two tokens of a prompt are a number in base 100:
the length of its response in tokens, which every generator follows. Prompts and responses consist of the words `w3`,
`w4`, ...; each word is one token, whose id is the number of the word. Imports only the standard library, because the
environment of TRL imports this file too.
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
    """Return, for each step, one prompt of `tokens` words per length, in random order."""
    generator = random.Random(seed)
    prompts = []
    for _ in range(steps):
        for length in generator.sample(lengths, len(lengths)):
            numbers = [*divmod(length, _BASE), *(generator.randrange(_BASE) for _ in range(tokens - 2))]
            prompts.append(" ".join(f"w{FIRST_WORD + number}" for number in numbers))
    return prompts


def response_length(prompt_ids: Sequence[int]) -> int:
    """Return the length in tokens of the response to a prompt."""
    return (prompt_ids[0] - FIRST_WORD) * _BASE + prompt_ids[1] - FIRST_WORD


def score(response: str) -> float:
    """Return the share of words with even numbers: a cheap reward that differs between samples."""
    words = response.split()
    return sum(word[-1] in "02468" for word in words) / max(1, len(words))


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> float:
    """Score a response: `score` with the signature of a verl reward function."""
    return score(solution_str)
