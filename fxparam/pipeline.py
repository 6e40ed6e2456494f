"""The pipeline: the passes a program goes through, in order."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fxparam.passes.hoist import Hoist
from fxparam.passes.simplify import Simplify
from fxparam.passes.substitute import Substitute
from fxparam.program import Fragment, Pass


def training_pipeline(fragments: Mapping[str, Fragment], weights: Mapping[str, Tensor], *, model: bool) -> tuple[Pass, ...]:
    """From a traced model to a prologue and a body.

    Args:
        fragments: the graph of each site, by its home.
        weights: the present values of the weights, by name.
        model: whether the program holds a model; without one there are only its weights, and no body.
    """
    return (
        Substitute(fragments),
        Simplify(),
        Hoist(weights, model=model),
    )
