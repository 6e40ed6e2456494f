"""``nn.MultiheadAttention``: it reads the weight of its own child, and has a fast path in eval."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers.common import (
    FLAT,
    QUIET,
    TRACES,
    Case,
    Check,
    every_check,
    made,
    outputs_of,
    same,
    step,
)
from torch import Tensor, nn

import fxparam as fxp

MASK = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False, True] * 2 + [False]])
CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)


class SelfAttention(nn.Module):
    """Attention with fixed keywords."""

    def __init__(self, keywords: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **{"batch_first": True, **options})
        self.keywords = keywords or {}

    def forward(self, x: Tensor) -> Any:
        return self.attention(x, x, x, **self.keywords)


class Cross(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        return self.attention(query, key, value)


def batch() -> tuple[Tensor]:
    return (torch.randn(3, 5, 8),)


def cross(key: int = 8, value: int = 8) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(3, 4, 8), torch.randn(3, 5, key), torch.randn(3, 5, value))


BOTH = ("attention.in_proj_weight", "attention.out_proj.weight")
BIASES = ("*bias*",)
CASES: dict[str, Case] = {
    "in projection": Case(SelfAttention, BOTH[:1], batch),
    "out projection": Case(SelfAttention, BOTH[1:], batch),
    "both": Case(SelfAttention, BOTH, batch),
    "bare": Case(lambda: nn.MultiheadAttention(8, 2), ("in_proj_weight", "out_proj.weight"), lambda: batch() * 3),
    "biases": Case(SelfAttention, BIASES, batch, FLAT),
    "everything": Case(lambda: SelfAttention(add_bias_kv=True), ("*",), batch, ("module", "mask")),
    "own sizes": Case(lambda: Cross(kdim=6, vdim=4), ("attention.?_proj_weight", *BOTH[1:]), cross(6, 4)),
    "cross": Case(Cross, BOTH, cross()),
    "bias of keys": Case(lambda: SelfAttention(add_bias_kv=True), ("attention.bias_?", *BOTH), batch, ("module", "mask")),
    "zero attention": Case(lambda: SelfAttention(add_zero_attn=True), BOTH, batch),
    "no bias": Case(lambda: SelfAttention(bias=False), BOTH, batch),
    "time first": Case(lambda: SelfAttention(batch_first=False), BOTH, batch),
    "dropout": Case(lambda: SelfAttention(dropout=0.5), BOTH, batch),
    "without attention weights": Case(lambda: SelfAttention({"need_weights": False}), BOTH, batch),
    "attention weights by head": Case(lambda: SelfAttention({"average_attn_weights": False}), BOTH, batch),
    "padding": Case(lambda: SelfAttention({"key_padding_mask": MASK}), BOTH, batch),
    "padding, without attention weights": Case(
        lambda: SelfAttention({"key_padding_mask": MASK, "need_weights": False}), BOTH, batch
    ),
    "causal": Case(lambda: SelfAttention({"attn_mask": CAUSAL, "need_weights": False}), BOTH, batch),
    "causal by hint": Case(lambda: SelfAttention({"attn_mask": CAUSAL, "need_weights": False, "is_causal": True}), BOTH, batch),
    "both masks": Case(lambda: SelfAttention({"attn_mask": CAUSAL, "key_padding_mask": MASK}), BOTH, batch),
    "unbatched": Case(SelfAttention, BOTH, lambda: (torch.randn(5, 8),)),
}


@every_check(CASES, kinds=2)
def test_what_every_layer_must_do(check: Check, case: Case, kind: str, trace: str) -> None:
    check(case, kind, trace)


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("quiet", QUIET)
def test_the_fast_path_is_taken_and_sees_the_weights_of_now(quiet: Any, trace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["both"]
    model, oracle = made(case, "weight_norm", trace)
    taken = []
    fast = torch._native_multi_head_attention

    def counted(*args: Any, **kwargs: Any) -> Any:
        taken.append(args)
        return fast(*args, **kwargs)

    monkeypatch.setattr(torch, "_native_multi_head_attention", counted)
    model.eval()
    oracle.train(False)
    for seed in range(3):
        with quiet():
            got = outputs_of(model, case, seed)
            assert len(taken) == 2 * seed + 1
            same(got, outputs_of(oracle, case, seed))
        step(model, oracle, case, seed)


@pytest.mark.parametrize("trace", TRACES)
def test_weights_are_evaluated_once_for_all_their_reads(trace: str) -> None:
    model = fxp.transform(SelfAttention(), dict.fromkeys(BOTH, fxp.weight_norm()), trace=trace)
    for _ in range(3):
        model(*batch())
    assert model.stats.refreshes == 1


@pytest.mark.parametrize("trace", TRACES)
def test_the_three_projections_tied_to_one(trace: str) -> None:
    """Queries, keys and values of own sizes have a weight each; one map may yield all of them."""
    net = Cross(kdim=6, vdim=4)
    names = [f"attention.{name}_proj_weight" for name in "qkv"]
    model = fxp.transform(net, {fxp.joint(*names): fxp.flat()}, trace=trace, copy=True)
    args = cross(6, 4)()
    same(model(*args), net(*args))
    loss = lambda module: torch.stack([t.sin().sum() for t in module(*args)]).sum()  # noqa: E731
    want = torch.autograd.grad(loss(net), [net.get_parameter(name) for name in names])
    (got,) = torch.autograd.grad(loss(model), list(model.latents().values()))
    same(got, torch.cat([t.flatten() for t in want]))
