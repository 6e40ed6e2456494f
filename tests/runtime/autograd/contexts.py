"""Situations: checkpointing, anomaly mode, functorch, forward mode, other modes, hooks, writes."""
# mypy: disable-error-code="arg-type,misc"

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
import torch.utils.checkpoint as ckpt
from runtime.autograd.common import Case, Model, X, Y, apply_weights
from runtime.tables import collector
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

CASES: dict[str, Case] = {}
case = collector(CASES)


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
    m.latents[2].register_post_accumulate_grad_hook(lambda latent: calls.append(latent.grad.clone()))
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
