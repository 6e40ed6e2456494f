"""Embeddings, in all their modes, and bilinear layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers.common import (
    ALL,
    FLAT,
    TRACES,
    Case,
    Check,
    check_assigned,
    check_training,
    every_check,
    made,
    outputs_of,
    same,
)
from torch import Tensor, nn

import fxparam as fxp


def tokens(*size: int) -> Any:
    return lambda: (torch.randint(0, 9, size or (3, 5)),)


def bags() -> tuple[Tensor, Tensor]:
    return torch.randint(0, 9, (7,)), torch.tensor([0, 3, 3])


def weighted() -> tuple[Tensor, Tensor, Tensor]:
    return (*bags(), torch.randn(7))


CASES: dict[str, Case] = {
    "embedding": Case(lambda: nn.Embedding(9, 4), ("weight",), tokens()),
    "padding": Case(lambda: nn.Embedding(9, 4, padding_idx=2), ("weight",), tokens(20), FLAT),
    "by frequency": Case(lambda: nn.Embedding(9, 4, scale_grad_by_freq=True), ("weight",), tokens(), FLAT),
    **{
        f"bag, {mode}": Case(lambda mode=mode: nn.EmbeddingBag(9, 4, mode=mode), ("weight",), tokens())  # type: ignore[misc]
        for mode in ("sum", "mean", "max")
    },
    "bag, offsets": Case(lambda: nn.EmbeddingBag(9, 4), ("weight",), bags),
    "bag, padding": Case(lambda: nn.EmbeddingBag(9, 4, padding_idx=2), ("weight",), tokens(), FLAT),
    "bilinear": Case(lambda: nn.Bilinear(4, 3, 5), ("weight",), lambda: (torch.randn(6, 4), torch.randn(6, 3)), FLAT),
    "bilinear, all": Case(lambda: nn.Bilinear(4, 3, 5), ("*",), lambda: (torch.randn(6, 4), torch.randn(6, 3)), FLAT),
}


@every_check(CASES, kinds=4)
def test_what_every_layer_must_do(check: Check, case: Case, kind: str, trace: str) -> None:
    check(case, kind, trace)


RENORMED: dict[str, tuple[Any, Any]] = {
    "embedding": (lambda: nn.Embedding(9, 4, max_norm=0.5), tokens()),
    "bag": (lambda: nn.EmbeddingBag(9, 4, max_norm=0.5, mode="sum"), bags),
    "in a model": (lambda: nn.Sequential(nn.Embedding(9, 4, max_norm=0.5), nn.Linear(4, 3)), tokens()),
}


@pytest.mark.filterwarnings("ignore:.*was written in place, and the write does not last")
@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("name", RENORMED)
def test_an_embedding_that_writes_its_weight_at_each_call(name: str, kind: str, trace: str) -> None:
    """``max_norm`` scales the rows that are looked up, in place: a computed weight starts anew from its latents each time."""
    make, inputs = RENORMED[name]
    case = Case(make, ("0.weight",) if name == "in a model" else ("weight",), inputs)
    check_training(case, kind, trace)
    check_assigned(case, kind, trace)


@pytest.mark.parametrize("trace", TRACES)
def test_what_was_scaled_by_one_call_is_not_seen_by_the_next(trace: str) -> None:
    case = Case(lambda: nn.Embedding(9, 4, max_norm=0.1), ("weight",), tokens(20))
    model, oracle = made(case, "weight_norm", trace)
    (weight,) = oracle.weights().values()
    with torch.no_grad():
        outputs_of(model, case, 0)
        with pytest.warns(RuntimeWarning, match="weight was written in place, and the write does not last"):
            same(model.weight, weight)


@pytest.mark.parametrize("trace", TRACES)
def test_weights_of_the_items_of_a_bag_have_gradients(trace: str) -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(9, 4, mode="sum")

        def forward(self, items: Tensor, offsets: Tensor, scale: Tensor) -> Tensor:
            return self.bag(items, offsets, per_sample_weights=scale)

    check_training(Case(Weighted, ("bag.weight",), weighted), "weight_norm", trace)


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_reach_the_latents_as_in_pytorch(layer: Any, trace: str) -> None:
    """Only maps whose derivative takes sparse gradients: here the identity times a number."""

    class Halved(nn.Module):
        def forward(self, latent: Tensor) -> Tensor:
            return latent * 0.5

        def right_inverse(self, weight: Tensor) -> Tensor:
            return weight * 2

    net, oracle = layer(9, 4, sparse=True), layer(9, 4, sparse=True)
    oracle.load_state_dict(net.state_dict())
    torch.nn.utils.parametrize.register_parametrization(oracle, "weight", Halved())
    model = fxp.transform(net, {"weight": Halved()}, trace=trace)
    (items,) = tokens()()
    for _ in range(2):
        for module in (model, oracle):
            module.zero_grad()
            module(items).sin().sum().backward()
            with torch.no_grad():
                for parameter in module.parameters():
                    assert parameter.grad is not None
                    parameter -= 0.1 * parameter.grad.to_dense()
        for got, want in zip(model.parameters(), oracle.parameters(), strict=True):
            assert got.grad is not None and want.grad is not None
            same(got.grad.to_dense(), want.grad.to_dense())
            same(got, want)
