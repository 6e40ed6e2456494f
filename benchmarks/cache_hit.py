"""What finding the weights current costs: the check before each forward, for stacks of weight-normed layers, and its share of
the forward of a small transformer.

    python benchmarks/cache_hit.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice

import torch
from harness import race, table
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import fxparam as fxp


class Reads(nn.Module):
    """Reads the weight of each of its layers (or of none) and computes nothing with it."""

    def __init__(self, layers: int, read: int | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(layers))
        self.read = layers if read is None else read

    def forward(self, x: Tensor) -> Tensor:
        for layer in islice(self.layers, self.read):
            _ = layer.weight
        return x


class ReadsOf(nn.Module):
    """Reads the weights of the linear layers of a model and computes nothing with them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.layers = [module for module in model.modules() if isinstance(module, nn.Linear)]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            _ = layer.weight
        return x


def stacks() -> None:
    x = torch.zeros(1)
    spec = {"*.weight": fxp.weight_norm()}
    for layers in (10, 100, 1000):
        computed = Reads(layers)
        for layer in computed.layers:
            weight_norm(layer)
        contestants: dict[str, Callable[[], object]] = {
            "plain attributes": partial(Reads(layers), x),
            "fxparam, the check alone": partial(fxp.transform(Reads(layers, 0), spec, trace="live"), x),
            "fxparam, check and reads": partial(fxp.transform(Reads(layers), spec, trace="live"), x),
            "parametrize": partial(computed, x),
        }
        with torch.no_grad():
            print(table(f"A forward that reads {layers} weights", race(contestants, rounds=50), "plain attributes"), "\n")


def transformer() -> None:
    layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True, dropout=0.0)
    plain = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    model = fxp.transform(plain, {fxp.where(nn.Linear): fxp.weight_norm()})
    x = torch.randn(8, 64, 128)
    contestants: dict[str, Callable[[], object]] = {
        "plain": partial(plain, x),
        "fxparam": partial(model, x),
        # Without the rest of the forward, whose time moves by more than this from round to round.
        "fxparam, check and reads alone": partial(fxp.transform(ReadsOf(plain), {fxp.where(nn.Linear): fxp.weight_norm()}), x),
    }
    timings = race(contestants, rounds=100)
    print(table("Forward of a transformer (4 layers of 128, 12 weight-normed matrices, 8 x 64 tokens)", timings, "plain"))
    share = timings["fxparam, check and reads alone"].median / timings["plain"].median
    print(f"\ncheck and reads are {100 * share:.1f} % of the forward")


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    stacks()
    transformer()


if __name__ == "__main__":
    main()
