"""Autograd situations: the transformed model against a plain one that computes its weights at each forward, errors included."""
# mypy: disable-error-code="operator,union-attr,arg-type,call-overload,has-type,list-item,misc", warn-unused-ignores=False

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad
import torch.utils.checkpoint as ckpt
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import fxparam as fxp

N = 6
DTYPE = torch.float64
Case = Callable[["Model"], list[Any]]
CASES: dict[str, Case] = {}


def _noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


X, Y = _noise(9, 4, N), _noise(10, 4, N)


def skew_exp(latent: Tensor) -> Tensor:
    lower = latent.tril(-1)
    return torch.matrix_exp(lower - lower.mT)


def pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two weights from two latents, through a node they share."""
    shared = a.exp()
    return shared * b, shared + 1.0


def apply_weights(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    hidden = torch.tanh(torch.tanh(x @ weights[0]) @ weights[1])
    return hidden @ weights[2]


class Net(nn.Module):
    """The user's model: three plain parameters."""

    def __init__(self) -> None:
        super().__init__()
        for number in range(3):
            self.register_parameter(f"w{number}", nn.Parameter(0.3 * _noise(number, N, N)))

    def read(self) -> list[Tensor]:
        return [self.w0, self.w1, self.w2]

    def forward(self, x: Tensor) -> Tensor:
        return apply_weights(self.read(), x)


class Plain(nn.Module):
    """The oracle: the same latents, the weights computed by plain PyTorch at each forward."""

    def __init__(self) -> None:
        super().__init__()
        for number in range(3):
            self.register_parameter(f"latent{number}", nn.Parameter(0.3 * _noise(number, N, N)))

    def read(self) -> list[Tensor]:
        a, b, c = self.parameters()
        return [skew_exp(a), *pair(b, c)]

    def forward(self, x: Tensor) -> Tensor:
        return apply_weights(self.read(), x)


class Model:
    """A model under test, with its latents in the oracle's order."""

    def __init__(self, module: nn.Module, latents: Sequence[Tensor]) -> None:
        self.module, self.latents = module, list(latents)

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)

    def read(self) -> list[Tensor]:
        if isinstance(self.module, fxp.ParametrizedModule):
            weights = self.module.weights()
            return [weights[name] for name in ("w0", "w1", "w2")]
        return self.module.read()  # type: ignore[operator]

    def named(self) -> dict[str, Tensor]:
        """Latents by name, in the oracle's order."""
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        return {names[id(latent)]: latent for latent in self.latents}

    def grads(self) -> list[Tensor | None]:
        return [None if latent.grad is None else latent.grad.clone() for latent in self.latents]


def plain() -> Model:
    module = Plain()
    return Model(module, list(module.parameters()))


def transformed(trace: str) -> Model:
    spec = {
        "w0": fxp.custom(skew_exp, init=lambda weight: weight),
        fxp.joint("w1", "w2"): fxp.custom(pair, init=lambda weights: tuple(weights)),
    }
    module = fxp.transform(Net(), spec, trace=trace)
    latents = module.latents()
    return Model(
        module,
        [
            latents["parametrizations.w0.original"],
            latents["parametrizations.joint1.original0"],
            latents["parametrizations.joint1.original1"],
        ],
    )


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


# --- forwards and backwards


@case
def one_step(m: Model) -> list[Any]:
    m(X).sum().backward()
    return m.grads()


@case
def accumulation(m: Model) -> list[Any]:
    m(X).sum().backward()
    m(Y).sum().backward()
    return m.grads()


@case
def two_forwards_one_backward(m: Model) -> list[Any]:
    (m(X).sum() + m(Y).sum()).backward()
    return m.grads()


@case
def two_forwards_two_backwards(m: Model) -> list[Any]:
    a, b = m(X).sum(), m(Y).sum()
    a.backward()
    b.backward()
    return m.grads()


@case
def backwards_interleaved(m: Model) -> list[Any]:
    a, b = m(X).sum(), m(Y).sum()
    a.backward()
    m(X + 1).sum().backward()
    b.backward()
    return m.grads()


@case
def two_losses_of_one_forward(m: Model) -> list[Any]:
    out = m(X)
    out.sum().backward(retain_graph=True)
    out.pow(2).sum().backward()
    return m.grads()


@case
def retained_across_a_forward(m: Model) -> list[Any]:
    out = m(X)
    out.sum().backward(retain_graph=True)
    m(Y).sum().backward()
    out.pow(2).sum().backward()
    return m.grads()


@case
def same_graph_twice(m: Model) -> list[Any]:
    loss = m(X).sum()
    loss.backward()
    return [*m.grads(), _outcome(loss.backward)]


@case
def same_graph_twice_after_another_forward(m: Model) -> list[Any]:
    loss = m(X).sum()
    loss.backward()
    m(Y).sum().backward()
    return [_outcome(loss.backward), *m.grads()]


@case
def backward_after_eval_forward(m: Model) -> list[Any]:
    m(X).sum().backward()
    loss = m(Y).pow(2).sum()
    m.module.eval()
    with torch.no_grad():
        m(X)
    loss.backward()
    return m.grads()


@case
def backward_after_fused_step(m: Model) -> list[Any]:
    optimizer = torch.optim.SGD(m.latents, 0.1, fused=True)
    m(X).sum().backward()
    loss = m(Y).sum()
    optimizer.step()
    m.module.eval()
    m(X)
    m.module.train()
    loss.backward()
    return m.grads()


@case
def kept_graph_outlives_the_entry(m: Model) -> list[Any]:
    loss = m(X).pow(2).sum()
    loss.backward(retain_graph=True)
    m.module.eval()
    m(Y)
    loss.backward()
    return [*m.grads(), _outcome(loss.backward)]


# --- autograd.grad and higher order


@case
def gradient_penalty(m: Model) -> list[Any]:
    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
    (g.norm() + m(Y).sum()).backward()
    return m.grads()


@case
def gradient_penalty_on_latents(m: Model) -> list[Any]:
    gs = torch.autograd.grad(m(X).pow(2).sum(), m.latents, create_graph=True)
    torch.stack([g.pow(2).sum() for g in gs]).sum().backward()
    return m.grads()


@case
def hessian_vector_product(m: Model) -> list[Any]:
    gs = torch.autograd.grad(m(X).pow(2).sum(), m.latents, create_graph=True)
    inner = torch.stack([(g * p).sum() for g, p in zip(gs, m.latents, strict=True)]).sum()
    return list(torch.autograd.grad(inner, m.latents))


@case
def third_order(m: Model) -> list[Any]:
    value = m(X).pow(2).sum()
    for _ in range(2):
        gs = torch.autograd.grad(value, m.latents, create_graph=True)
        value = torch.stack([g.pow(2).sum() for g in gs]).sum()
    return list(torch.autograd.grad(value, m.latents))


@case
def grad_of_some_latents(m: Model) -> list[Any]:
    loss = m(X).sum()
    first = torch.autograd.grad(loss, [m.latents[0]], retain_graph=True)
    last = torch.autograd.grad(loss, [m.latents[2]])
    m(Y).sum().backward()
    return [*first, *last, *m.grads()]


@case
def grad_of_some_latents_then_forward(m: Model) -> list[Any]:
    first = torch.autograd.grad(m(X).sum(), [m.latents[0]])
    m(Y).sum().backward()
    return [*first, *m.grads()]


@case
def grad_of_the_weights(m: Model) -> list[Any]:
    weights = m.read()
    found = torch.autograd.grad(apply_weights(weights, X).sum(), weights)
    m(Y).sum().backward()
    return [*found, *m.grads()]


@case
def loss_of_one_weight(m: Model) -> list[Any]:
    (X @ m.read()[0]).sum().backward()
    m(Y).sum().backward()
    return m.grads()


@case
def losses_of_one_weight_each(m: Model) -> list[Any]:
    (X @ m.read()[1]).sum().backward()
    (X @ m.read()[2]).sum().backward()
    return m.grads()


@case
def losses_of_weights_that_share_a_node(m: Model) -> list[Any]:
    weights = m.read()
    a, b = (X @ weights[1]).sum(), (X @ weights[2]).sum()
    a.backward()
    return [_outcome(b.backward)]


@case
def losses_of_weights_apart(m: Model) -> list[Any]:
    weights = m.read()
    a, b = (X @ weights[0]).sum(), (X @ weights[1]).sum()
    a.backward()
    b.backward()
    return m.grads()


@case
def backward_to_some_inputs(m: Model) -> list[Any]:
    m(X).sum().backward(inputs=[m.latents[1]])
    m(Y).sum().backward()
    return m.grads()


@case
def hessian_of_the_input(m: Model) -> list[Any]:
    return [torch.autograd.functional.hessian(lambda x: m(x).pow(2).sum(), X.clone())]


@case
def batched_gradients(m: Model) -> list[Any]:
    return list(torch.autograd.grad(m(X).sum(0), m.latents, torch.eye(N, dtype=DTYPE), is_grads_batched=True))


# --- exceptions and steps


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        raise ValueError("no gradient today")


@case
def exception_in_backward(m: Model) -> list[Any]:
    weights = m.read()
    loss = (_Fails.apply(X @ weights[0]) @ weights[1]).sum() + weights[2].sum()
    outcome = _outcome(loss.backward)
    for latent in m.latents:
        latent.grad = None
    m(Y).sum().backward()
    return [outcome, *m.grads()]


@case
def exception_in_forward(m: Model) -> list[Any]:
    outcome = _outcome(lambda: m(torch.zeros(3, N - 1, dtype=DTYPE)))
    m(Y).sum().backward()
    return [outcome, *m.grads()]


@case
def step_before_backward(m: Model) -> list[Any]:
    optimizer = torch.optim.SGD(m.latents, 0.1)
    a, b = m(X).sum(), m(Y).sum()
    a.backward()
    optimizer.step()
    return [_outcome(b.backward, "modified by an inplace operation")]


@case
def fused_step_before_backward(m: Model) -> list[Any]:
    optimizer = torch.optim.SGD(m.latents, 0.1, fused=True)
    a = m(X).sum()
    a.backward()
    b = m(Y).sum()
    optimizer.step()
    b.backward()
    return m.grads()


@case
def hand_written_steps(m: Model) -> list[Any]:
    for _ in range(3):
        gs = torch.autograd.grad(m(X).sum(), m.latents)
        with torch.no_grad():
            for latent, g in zip(m.latents, gs, strict=True):
                latent -= 0.1 * g
    return [m(X).detach()]


# --- checkpointing, anomaly, saved-tensor hooks


@case
def checkpoint_reentrant_warm(m: Model) -> list[Any]:
    m.read()
    ckpt.checkpoint(lambda x: apply_weights(m.read(), x), X.clone().requires_grad_(), use_reentrant=True).sum().backward()
    m(Y).sum().backward()
    return m.grads()


@case
def checkpoint_reentrant_cold(m: Model) -> list[Any]:
    ckpt.checkpoint(m, X.clone().requires_grad_(), use_reentrant=True).sum().backward()
    m(Y).sum().backward()
    return m.grads()


@case
def checkpoint_cold(m: Model) -> list[Any]:
    ckpt.checkpoint(m, X, use_reentrant=False).sum().backward()
    m(Y).sum().backward()
    return m.grads()


@case
def checkpoint_warm(m: Model) -> list[Any]:
    m.read()
    ckpt.checkpoint(m, X, use_reentrant=False).sum().backward()
    return m.grads()


@case
def checkpoint_twice(m: Model) -> list[Any]:
    a = ckpt.checkpoint(m, X, use_reentrant=False)
    ckpt.checkpoint(m, a, use_reentrant=False).sum().backward()
    return m.grads()


@case
def checkpoint_without_determinism_check(m: Model) -> list[Any]:
    ckpt.checkpoint(m, X, use_reentrant=False, determinism_check="none").sum().backward()
    return m.grads()


@case
def checkpoint_selective(m: Model) -> list[Any]:
    aten = torch.ops.aten
    context = functools.partial(
        ckpt.create_selective_checkpoint_contexts, [aten.mm.default, aten.exp.default, aten.tanh.default]
    )
    ckpt.checkpoint(m, X, use_reentrant=False, context_fn=context).sum().backward()
    return m.grads()


@case
def anomaly_detection(m: Model) -> list[Any]:
    with warnings.catch_warnings(action="ignore"), torch.autograd.detect_anomaly(check_nan=False):
        m(X).sum().backward()
        m(Y).sum().backward()
    return m.grads()


@case
def saved_on_cpu(m: Model) -> list[Any]:
    with torch.autograd.graph.save_on_cpu():
        loss = m(X).sum()
    loss.backward()
    m(Y).sum().backward()
    return m.grads()


# --- functorch and forward mode


def _loss_of(m: Model) -> Callable[..., Tensor]:
    return lambda parameters, x: functional_call(m.module, parameters, (x,)).sum()


@case
def func_grad_of_latents(m: Model) -> list[Any]:
    found = grad(_loss_of(m))(m.named(), X)
    m(X).sum().backward()
    return [*found.values(), *m.grads()]


@case
def func_grad_of_the_input(m: Model) -> list[Any]:
    found = grad(lambda x: m(x).sum())(X)
    m(X).sum().backward()
    return [found, *m.grads()]


@case
def func_gradients_per_sample(m: Model) -> list[Any]:
    latents = {name: latent.detach() for name, latent in m.named().items()}
    one = grad(lambda p, x: functional_call(m.module, p, (x[None],)).sum())
    found = vmap(one, (None, 0))(latents, X)
    m(X).sum().backward()
    return [*found.values(), *m.grads()]


@case
def func_vmap_of_inputs(m: Model) -> list[Any]:
    out = torch.vmap(lambda x: m(x[None])[0])(X)
    out.sum().backward()
    m(Y).sum().backward()
    return [out.detach(), *m.grads()]


@case
def func_jvp_of_latents(m: Model) -> list[Any]:
    latents = {name: latent.detach() for name, latent in m.named().items()}
    ones = {name: torch.ones_like(latent) for name, latent in latents.items()}
    out, tangent = jvp(lambda p: functional_call(m.module, p, (X,)), (latents,), (ones,))
    m(X).sum().backward()
    return [out, tangent, *m.grads()]


@case
def forward_mode_of_the_input(m: Model) -> list[Any]:
    with fwad.dual_level():
        out = fwad.unpack_dual(m(fwad.make_dual(X, Y)))
        found = [out.primal.detach(), out.tangent.detach()]
    m(X).sum().backward()
    return [*found, *m.grads()]


@case
def forward_mode_of_latents(m: Model) -> list[Any]:
    with fwad.dual_level():
        duals = {name: fwad.make_dual(latent, torch.ones_like(latent)) for name, latent in m.named().items()}
        out = fwad.unpack_dual(functional_call(m.module, duals, (X,)))
        return [out.primal.detach(), out.tangent.detach()]


@case
def functional_call_with_parameters(m: Model) -> list[Any]:
    m(X)
    doubled = {name: nn.Parameter(latent.detach() * 2) for name, latent in m.named().items()}
    out = functional_call(m.module, doubled, (X,))
    out.sum().backward()
    return [out.detach(), *(latent.grad for latent in doubled.values()), *m.grads()]


@case
def functional_call_then_own_latents(m: Model) -> list[Any]:
    tensors = {name: latent.detach() * 2 for name, latent in m.named().items()}
    a = functional_call(m.module, tensors, (X,)).detach()
    return [a, m(X).detach(), functional_call(m.module, tensors, (X,)).detach()]


# --- modes, hooks, writes


@case
def no_grad_then_grad(m: Model) -> list[Any]:
    with torch.no_grad():
        m(X)
    m(X).sum().backward()
    return m.grads()


@case
def inference_then_grad(m: Model) -> list[Any]:
    with torch.inference_mode():
        m(X)
    m(X).sum().backward()
    return m.grads()


@case
def hooks_on_latents(m: Model) -> list[Any]:
    calls: list[Tensor] = []
    m.latents[0].register_hook(lambda gradient: calls.append(gradient.clone()))
    m(X).sum().backward()
    m(Y).sum().backward()
    return [len(calls), *calls, *m.grads()]


@case
def hooks_on_latents_once_per_backward(m: Model) -> list[Any]:
    calls: list[Tensor] = []
    m.latents[0].register_hook(lambda gradient: calls.append(gradient.clone()))
    (m(X).sum() + m(Y).sum()).backward()
    return [len(calls), *calls, *m.grads()]


@case
def hooks_that_change_gradients(m: Model) -> list[Any]:
    m.latents[1].register_hook(lambda gradient: 2 * gradient)
    m(X).sum().backward()
    return m.grads()


@case
def hooks_after_accumulation(m: Model) -> list[Any]:
    calls: list[Tensor] = []
    m.latents[2].register_post_accumulate_grad_hook(lambda latent: calls.append(latent.grad.clone()))  # type: ignore[union-attr]
    m(X).sum().backward()
    return [len(calls), *calls, *m.grads()]


@case
def retained_gradient_of_a_weight(m: Model) -> list[Any]:
    weights = m.read()
    weights[0].retain_grad()
    apply_weights(weights, X).sum().backward()
    return [weights[0].grad, *m.grads()]


@case
def weight_written(m: Model) -> list[Any]:
    with torch.no_grad():
        m.read()[0].mul_(2.0)
    return [m(X).detach()]


@case
def weight_written_with_gradient(m: Model) -> list[Any]:
    weights = m.read()
    weights[0].mul_(2.0)
    apply_weights(weights, X).sum().backward()
    m(X).sum().backward()
    return m.grads()


@case
def frozen_between_forwards(m: Model) -> list[Any]:
    m(X).sum().backward()
    m.latents[0].requires_grad_(False)
    m(Y).sum().backward()
    m.latents[0].requires_grad_(True)
    m(Y).pow(2).sum().backward()
    return m.grads()


@case
def all_frozen(m: Model) -> list[Any]:
    for latent in m.latents:
        latent.requires_grad_(False)
    out = m(X)
    return [out, out.requires_grad]


def _outcome(function: Callable[[], object], text: str = "") -> str:
    """What happens: the type of the error (and whether its text says so), or that there is none."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}{': ' + text if text and text in str(error) else ''}"
    return "no error"


def _same(got: Any, want: Any) -> None:
    if isinstance(want, Tensor):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    else:
        assert got == want


# PyTorch's own decompositions for forward mode are scripted on first use.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("trace", ["live", "auto"])
@pytest.mark.parametrize("name", CASES)
def test_as_plain_pytorch(name: str, trace: str) -> None:
    want = CASES[name](plain())
    warned = pytest.warns(RuntimeWarning, match="written in place") if name.startswith("weight_written") else nullcontext()
    with warned:
        got = CASES[name](transformed(trace))
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        _same(one, other)


def test_the_two_traces_differ() -> None:
    assert transformed("live").module.report.body == "live"  # type: ignore[union-attr]
    assert transformed("auto").module.report.body == "graph"  # type: ignore[union-attr]


def test_the_table_holds_every_situation() -> None:
    assert len(CASES) >= 48


@pytest.mark.parametrize("trace", ["live", "auto"])
def test_a_second_order_graph_is_not_shared_with_the_next_forward(trace: str) -> None:
    model = fxp.transform(nn.Linear(4, 4).double(), {"weight": fxp.orthogonal(map="matrix_exp")}, trace=trace)
    oracle = fxp.transform(nn.Linear(4, 4).double(), {"weight": fxp.orthogonal(map="matrix_exp")}, trace=trace)
    oracle.load_state_dict(model.state_dict())
    x = torch.randn(3, 4, dtype=torch.float64)
    for m in (model, oracle):
        found = torch.autograd.grad(m(x).square().sum(), list(m.parameters()), create_graph=True)
        sum(gradient.square().sum() for gradient in found).backward()  # type: ignore[union-attr]
        if m is oracle:
            m.invalidate()
        # The backward above freed what the second order saved; this one has a graph of its own.
        m(x).sin().sum().backward()
    for p, q in zip(model.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)
