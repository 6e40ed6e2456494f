"""A longest common subsequence and a longest increasing one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

_MOST_EDITS = 1000


def common_subsequence(a: Sequence[int], b: Sequence[int]) -> list[tuple[int, int]]:
    """Positions ``(i, j)`` of a longest common subsequence, increasing in both.

    Greedy algorithm of Myers, *An O(ND) difference algorithm and its variations* (Algorithmica 1986), figure 2. Beyond
    1,000 edits the best prefix found so far is returned.
    """
    reach = {1: 0}
    trace: list[dict[int, int]] = []
    for edits in range(min(len(a) + len(b), _MOST_EDITS) + 1):
        trace.append({k: reach[k] for k in range(-edits - 1, edits + 2) if k in reach})
        for k in range(-edits, edits + 1, 2):
            down = k == -edits or (k != edits and reach[k - 1] < reach[k + 1])
            x = reach[k + 1] if down else reach[k - 1] + 1
            while x < len(a) and 0 <= x - k < len(b) and a[x] == b[x - k]:
                x += 1
            reach[k] = x
            if x >= len(a) and x - k >= len(b):
                return _matches(trace, x, x - k)
    within = [(x, x - k) for k, x in reach.items() if x <= len(a) and 0 <= x - k <= len(b) and (k - edits) % 2 == 0]
    return _matches(trace, *max(within, key=sum))


def _matches(trace: list[dict[int, int]], x: int, y: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for edits in range(len(trace) - 1, -1, -1):
        reach, k = trace[edits], x - y
        down = k == -edits or (k != edits and reach[k - 1] < reach[k + 1])
        start = reach[k + 1] if down else reach[k - 1] + 1
        while x > max(start, 0) and y > 0:
            x, y = x - 1, y - 1
            found.append((x, y))
        if edits:
            x, y = (x, y - 1) if down else (x - 1, y)
    return found[::-1]


def increasing_subsequence(values: Sequence[int]) -> list[int]:
    """Positions of a longest strictly increasing subsequence (patience sorting, O(n log n))."""
    tails: list[int] = []
    at: list[int] = []
    previous: list[int] = []
    for i, value in enumerate(values):
        pile = bisect_left(tails, value)
        previous.append(at[pile - 1] if pile else -1)
        tails[pile : pile + 1] = [value]
        at[pile : pile + 1] = [i]
    result: list[int] = []
    i = at[-1] if at else -1
    while i >= 0:
        result.append(i)
        i = previous[i]
    return result[::-1]
