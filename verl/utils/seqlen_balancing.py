"""Balanced partition of samples of different lengths among workers."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def balanced_partition(lengths: Sequence[int], k: int, equal_size: bool = True) -> list[list[int]]:
    """Split items into `k` parts of similar sums with the differencing method (Karmarkar & Karp, 1982).

    Args:
        lengths: weights of the items, for example in tokens.
        k: number of parts.
        equal_size: the sizes of the parts differ by at most one item; if False, any sizes.

    Returns:
        k sorted lists of indices that contain every index once. The parts are ordered by their sums, largest first.

    Raises:
        ValueError: `k` is less than 1.
    """
    if k < 1:
        raise ValueError(f"k={k}: must be at least 1 part")
    if k == 1:
        return [list(range(len(lengths)))]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    # A state is k (sum, members) pairs, largest sum first. Each step merges the two states of the largest spread, large
    # parts with small ones, until one state is left. An entry of the heap is (negative spread, tie breaker, state).
    heap: list[tuple[float, int, list[tuple[float, list[int]]]]] = []
    group = k if equal_size else 1
    for number, start in enumerate(range(0, len(order), group)):
        members = order[start : start + group]
        state = [(float(lengths[i]), [i]) for i in members] + [(0.0, [])] * (k - len(members))
        heapq.heappush(heap, (-_spread(state), number, state))
    number = len(heap)
    while len(heap) > 1:
        _, _, first = heapq.heappop(heap)
        _, _, second = heapq.heappop(heap)
        merged = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(first, reversed(second), strict=True)]
        merged.sort(key=lambda part: -part[0])
        heapq.heappush(heap, (-_spread(merged), number, merged))
        number += 1
    parts = heap[0][2] if heap else [(0.0, [])] * k
    return [sorted(members) for _, members in parts]


def _spread(state: list[tuple[float, list[int]]]) -> float:
    return state[0][0] - state[-1][0]
