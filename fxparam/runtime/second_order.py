"""Gradients of private graphs, and their derivatives, which are private as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

AGAIN = (
    "Trying to backward through the graph a second time (or directly access saved tensors after they have already been "
    "freed). Saved intermediate values of the graph are freed when you call .backward() or autograd.grad(). Specify "
    "retain_graph=True if you need to backward through the graph a second time or if you need to access saved tensors "
    "after calling backward."
)


def differentiated(
    values: Sequence[Tensor],
    gradients: Sequence[Tensor],
    edges: Sequence[GradientEdge | None],
    inputs: Sequence[Tensor],
) -> Sequence[Tensor | None]:
    """``torch.autograd.grad`` of private values to private edges, connected to the public tensors behind these."""
    if torch.is_grad_enabled():
        return Derivative.apply(values, edges, len(gradients), *gradients, *inputs)
    return torch.autograd.grad(values, edges, gradients, retain_graph=True, allow_unused=True)  # type: ignore[arg-type]


class Derivative(torch.autograd.Function):
    """Gradients that are differentiated again. Arguments: the values, the edges, how many gradients, these, and the tensors
    behind the edges.

    A second-order backward goes through the graph of the first order as well, and frees it if it is not to keep it. That graph
    is shared with other forwards; so the second order is private, too, and the third.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Sequence[Tensor], edges: Sequence[GradientEdge], number: int, *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The gradients, without their graph."""
        ctx.set_materialize_grads(False)
        with torch.enable_grad():
            given = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors[:number]]
            found = torch.autograd.grad(values, edges, given, create_graph=True, allow_unused=True)
        ctx.found, ctx.tensors = found, tensors
        ctx.edges = (*(get_gradient_edge(tensor) if tensor.requires_grad else None for tensor in given), *edges)
        results = tuple(None if gradient is None else gradient.detach() for gradient in found)
        fixed = (result for result, one in zip(results, found, strict=True) if one is not None and not one.requires_grad)
        ctx.mark_non_differentiable(*fixed)
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        """Runs the private graph of the second order."""
        if ctx.found is None:
            raise RuntimeError(AGAIN)
        pairs = [
            (one, gradient)
            for one, gradient in zip(ctx.found, gradients, strict=True)
            if one is not None and one.requires_grad and gradient is not None
        ]
        needed = ctx.needs_input_grad[3:]
        wanted = [at for at, need in enumerate(needed) if need]
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.found = None
        if not pairs or not wanted:
            return (None, None, None, *(None for _ in needed))
        found = iter(
            differentiated(
                [one for one, _ in pairs],
                [gradient for _, gradient in pairs],
                [ctx.edges[at] for at in wanted],
                [ctx.tensors[at] for at in wanted],
            )
        )
        return (None, None, None, *(next(found) if need else None for need in needed))
