"""Substitute: a weight is computed where it was read, and the whole pipeline on one site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from programs import operations, site_program

from fxparam.passes.hoist import Hoist
from fxparam.passes.simplify import Simplify
from fxparam.passes.substitute import Substitute
from fxparam.program import run


def test_substitute_computes_a_tied_weight_once(golden: Callable[[str, str], None], execute: Any) -> None:
    program, fragments = site_program()
    before = str(program.graph)
    after = run(program, (Substitute(fragments),))
    golden("substitute_tied", str(after.graph))
    assert operations(after.graph) == ["tanh", "deliver", "linear", "linear"]
    assert "substituted" in after.facts
    assert str(program.graph) == before
    x, latent = torch.randn(2, 3), program.tensors["a.parametrizations.weight.original"]
    found = execute(after.graph, after.tensors, x)
    wanted = F.linear(F.linear(x, latent.tanh()), latent.tanh())
    torch.testing.assert_close(found, wanted)
    (a,) = torch.autograd.grad(found.square().sum(), latent)
    (b,) = torch.autograd.grad(wanted.square().sum(), latent)
    torch.testing.assert_close(a, b)


def test_substitute_without_sites_is_the_same_object() -> None:
    program, _ = site_program()
    bare = program.evolve(sites=())
    assert Substitute({}).rewrite(bare) is bare


def test_the_pipeline_on_a_site(golden: Callable[[str, str], None]) -> None:
    program, fragments = site_program()
    weight = program.tensors["a.parametrizations.weight.original"].detach().tanh()
    after = run(program, (Substitute(fragments), Simplify(), Hoist({"a.weight": weight, "b.weight": weight})))
    golden("pipeline_tied", f"prologue\n{after.prologue}\n\nbody\n{after.body}")
    assert after.values == ("a.weight",) and after.sources == ("a.parametrizations.weight.original",)
