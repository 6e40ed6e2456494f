"""Common and increasing subsequences against the textbook tables."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fxparam.graphdiff.myers import common_subsequence, increasing_subsequence


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12))
def test_common_subsequences_are_longest(a: list[int], b: list[int]) -> None:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    found = common_subsequence(a, b)
    assert len(found) == table[-1][-1]
    assert all(a[i] == b[j] for i, j in found)
    assert found == sorted(found) and len({i for i, _ in found} & set(range(len(a)))) == len({j for _, j in found}) == len(
        found
    )
    kept = increasing_subsequence(a)
    values = [a[k] for k in kept]
    assert kept == sorted(kept) and values == sorted(set(values))
    best = [0] * len(a)
    for i in range(len(a)):
        best[i] = 1 + max((best[j] for j in range(i) if a[j] < a[i]), default=0)
    assert len(kept) == max(best, default=0)


def test_alignment_beyond_the_limit_is_still_common() -> None:
    found = common_subsequence([0] * 3 + [1] * 1500, [0] * 3 + [2] * 1500)
    assert found[:3] == [(0, 0), (1, 1), (2, 2)] and len(found) == 3
