"""Running statistics, which normalizations write without moving a version, are never taken for constants of a step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recording.common import doubles
from torch import Tensor, nn

import fxparam as fxp


class Rescaled(nn.Module):
    """Divides its weight by statistics that somebody else keeps."""

    def __init__(self, statistics: nn.Module) -> None:
        super().__init__()
        self.weight, self.statistics = nn.Parameter(torch.rand(3, 3)), statistics

    def forward(self, x: Tensor) -> Tensor:
        var: Any = self.statistics.running_var
        return x @ (self.weight / (var + 1e-5).sqrt()).exp()


class Own(nn.Module):
    """Statistics of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, training=self.training)  # type: ignore[arg-type]


class Net(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.rescaled, self.linear = norm, Rescaled(norm), nn.Linear(3, 3)

    def forward(self, x: Tensor, *, normalize: bool = True) -> Tensor:
        y = self.norm(x) if normalize else x
        # A choice that no graph shows: the parts are recorded, the model is not.
        y = -y if y.sum() > 1e9 else y
        return self.linear(self.rescaled(y))


@pytest.mark.parametrize(
    ("norm", "later"),
    [(lambda: nn.BatchNorm1d(3), False), (lambda: nn.BatchNorm1d(3), True), (Own, False)],
    ids=["batch norm", "batch norm, first called later", "statistics of its own"],
)
@pytest.mark.parametrize("trace", ["auto", "record", "live"])
@doubles()
def test_arithmetic_on_running_statistics_follows_them(norm: Any, later: bool, trace: str) -> None:
    torch.manual_seed(0)
    net = Net(norm())
    reference = copy.deepcopy(net)
    model = fxp.transform(net, {"linear.weight": fxp.weight_norm()}, trace=trace)
    for number in range(6):
        x = (number + 1) * torch.rand(4, 3)
        options = {"normalize": not later or number > 1}
        got, want = model(x, **options), reference(x, **options)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        named = dict(reference.named_parameters())
        grads = torch.autograd.grad(
            got.sin().sum(), [model.get_parameter("rescaled.weight"), model.get_parameter("linear.bias")]
        )
        wanted = torch.autograd.grad(want.sin().sum(), [named["rescaled.weight"], named["linear.bias"]])
        for one, other in zip(grads, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    model.eval()
    reference.eval()
    for _ in range(2):
        torch.testing.assert_close(model(x), reference(x), rtol=1e-12, atol=1e-14)
    if trace != "live":
        # In eval mode they stay, and so the arithmetic moves out.
        assert model.report.body == "regions" and model.report.hoisted
