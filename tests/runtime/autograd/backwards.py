"""Situations: forwards and backwards, higher orders, exceptions and steps."""

from __future__ import annotations

from typing import Any

import torch
from runtime.autograd.common import DTYPE, Case, Model, N, X, Y, apply_weights, outcome
from runtime.tables import collector
from torch import Tensor

CASES: dict[str, Case] = {}
case = collector(CASES)


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
    return [*m.grads(), outcome(loss.backward)]


@case
def same_graph_twice_after_another_forward(m: Model) -> list[Any]:
    loss = m(X).sum()
    loss.backward()
    m(Y).sum().backward()
    return [outcome(loss.backward), *m.grads()]


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
    return [*m.grads(), outcome(loss.backward)]


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
    return [outcome(b.backward)]


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
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise ValueError("no gradient today")


@case
def exception_in_backward(m: Model) -> list[Any]:
    weights = m.read()
    loss = (_Fails.apply(X @ weights[0]) @ weights[1]).sum() + weights[2].sum()
    found = outcome(loss.backward)
    for latent in m.latents:
        latent.grad = None
    m(Y).sum().backward()
    return [found, *m.grads()]


@case
def exception_in_forward(m: Model) -> list[Any]:
    found = outcome(lambda: m(torch.zeros(3, N - 1, dtype=DTYPE)))
    m(Y).sum().backward()
    return [found, *m.grads()]


@case
def step_before_backward(m: Model) -> list[Any]:
    optimizer = torch.optim.SGD(m.latents, 0.1)
    a, b = m(X).sum(), m(Y).sum()
    a.backward()
    optimizer.step()
    return [outcome(b.backward, "modified by an inplace operation")]


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
