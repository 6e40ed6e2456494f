"""Two calls of a module in one forward that look the same and do not do the same: there is something that nobody guards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from recording.common import doubles
from torch import Tensor, nn

import fxparam as fxp


class Threaded(nn.Module):
    """Asks PyTorch for a setting that is no part of any signature."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.exp() if torch.get_num_threads() == 1 else x + self.weight.sum()


class Switching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.linear = Threaded(), nn.Linear(3, 3)

    def forward(self, x: Tensor, *, both: bool = True) -> Tensor:
        torch.set_num_threads(1)
        x = self.inner(x)
        if both:
            torch.set_num_threads(2)
            x = self.inner(x)
        return self.linear(x) if x.sum() > 0 else x


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("trace", ["auto", "record"])
@doubles()
def test_a_module_that_goes_two_ways_in_one_forward_stays_python(trace: str) -> None:
    net = Switching()
    model = fxp.transform(net, {"linear.weight": fxp.weight_norm()}, trace=trace)
    for seed in range(3):
        # With a gradient, as what the first call yields: the two calls have one signature.
        x = torch.rand(2, 3, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        torch.testing.assert_close(model(x), net(x), rtol=1e-12, atol=0)
    layer = model.report.layer_of("inner")
    assert (layer.layer, layer.reason) == ("live", "two calls of it that look the same did not do the same")
