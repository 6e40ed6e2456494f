"""What the tests of passes run on: nets with weight arithmetic of their own, and a program with a tied site."""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxparam.program import Fragment, Program, Site


def operations(graph: fx.Graph) -> list[str]:
    names = {"placeholder", "get_attr", "output"}
    return [str(getattr(n.target, "__name__", n.target)) for n in graph.nodes if n.op not in names]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.bias = nn.Parameter(torch.randn(3))
        self.register_buffer("scale", torch.rand(3))


class WeightStandardized(Net):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean(1, keepdim=True)) / (w.var(1, keepdim=True) + 1e-5).sqrt()
        return F.linear(x, w, self.bias)


class Normalized(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight, dim=1)) + self.bias


class Softmaxed(Net):
    def forward(self, x: Tensor) -> Tensor:
        alphas = self.bias.softmax(0)
        return alphas[0] * x + alphas[1] * x.relu() + alphas[2] * (x @ self.weight)


class EqualizedRate(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * (2 / self.weight.size(1)) ** 0.5, self.bias * 0.5)


class TupleValued(Net):
    def forward(self, x: Tensor) -> Tensor:
        q, r = torch.linalg.qr(self.weight)
        a, b = torch.split(self.weight * 2, (1, 2))
        return x @ q + x @ r.tanh() + x @ torch.cat((b, a))


class LowRank(Net):
    def forward(self, x: Tensor) -> Tensor:
        delta = torch.outer(self.bias, self.bias)
        return F.linear(x, self.weight + delta)


class Einsummed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.einsum("ij,kj,k->ik", self.weight, self.weight, self.bias)


class BufferScaled(Net):
    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * self.scale.exp())


class WithConstant(Net):
    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight + torch.eye(3) * 2) + torch.arange(3.0).exp()


HOISTED = (
    WeightStandardized,
    Normalized,
    Softmaxed,
    EqualizedRate,
    TupleValued,
    LowRank,
    Einsummed,
    BufferScaled,
    WithConstant,
)


def site_program() -> tuple[Program, dict[str, Fragment]]:
    body = fx.Graph()
    x = body.placeholder("x")
    y = body.call_function(F.linear, (x, body.get_attr("a.weight")))
    body.output(body.call_function(F.linear, (y, body.get_attr("b.weight"))))
    inner = fx.Graph()
    latent = inner.placeholder("latent")
    inner.output((inner.call_function(torch.tanh, (latent,)),))
    site = Site(
        names=("a.weight",),
        aliases=(("a.weight", "b.weight"),),
        home="a.parametrizations.weight",
        latents=("a.parametrizations.weight.original",),
        reads=(),
        declaration="tanh",
        origin="spec",
        start="",
    )
    tensors = {"a.parametrizations.weight.original": torch.randn(3, 3, requires_grad=True)}
    fragments = {site.home: Fragment(inner, ("a.parametrizations.weight.original",))}
    return Program(body, tensors, sites=(site,)), fragments
