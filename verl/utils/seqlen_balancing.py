"""Divides samples of different lengths among workers so that all have about the same to do."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def balanced_partition(lengths: Sequence[int], k: int, equal_size: bool = True) -> list[list[int]]:
    """Split items into `k` parts with sums as equal as the differencing method (Karmarkar & Karp, 1982) finds them.

    Args:
        lengths: the items' weights, for example tokens.
        k: number of parts.
        equal_size: part sizes differ by at most one item; otherwise any sizes.

    Returns:
        k lists of indices, each sorted; together every index once. Parts are ordered by their sums, largest first.
    """
    if k < 1:
        raise ValueError(f"k={k} parts: must be at least 1")
    if k == 1:
        return [list(range(len(lengths)))]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    # A state is k (sum, members) pairs, largest sum first. The two states of the widest spread are merged, large parts
    # with small ones, until one state is left. An entry's first number orders the heap, its second breaks ties.
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
