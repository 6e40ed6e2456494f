"""Dynamic trivialization: after every few optimizer steps the weight becomes the base, by hand and in a model."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from catalogue.test_models import Holder
from torch import Tensor

import fxparam as fxp
from fxparam import catalogue as cat
from fxparam.errors import SpecError

ENTRIES: dict[str, tuple[Any, tuple[int, ...], torch.dtype]] = {
    "square exp": (fxp.orthogonal(rebase_every=3), (4, 4), torch.float64),
    "tall exp": (fxp.orthogonal(map="matrix_exp", rebase_every=3), (5, 3), torch.float64),
    "wide cayley": (fxp.orthogonal(map="cayley", rebase_every=3), (3, 5), torch.float64),
    "tall householder": (fxp.orthogonal(map="householder", rebase_every=3), (5, 3), torch.float64),
    "batch of wide householder": (fxp.orthogonal(map="householder", rebase_every=3), (2, 3, 4), torch.float64),
    "rotations": (fxp.special_orthogonal(rebase_every=3), (2, 3, 3), torch.float64),
    "unitary": (fxp.unitary(map="cayley", rebase_every=3), (4, 3), torch.complex128),
    "subspaces": (fxp.grassmann(rebase_every=3), (5, 2), torch.float64),
    "wide subspaces": (fxp.grassmann(map="cayley", rebase_every=3), (2, 5), torch.float64),
}
each = pytest.mark.parametrize("name", ENTRIES)


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def drawn(name: str, seed: int) -> Tensor:
    _, shape, dtype = ENTRIES[name]
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@each
def test_the_weight_becomes_the_base(name: str) -> None:
    entry, _, _ = ENTRIES[name]
    module = entry.build(drawn(name, 0))
    module.right_inverse(module.project(drawn(name, 1)))
    latent = drawn(name, 2)
    weight, base, state = module(latent), module.base.clone(), torch.get_rng_state()
    after = module.rebase(latent)
    assert torch.equal(torch.get_rng_state(), state)
    assert after.shape == latent.shape and not torch.equal(module.base, base)
    close(module(after), weight)
    size = module.base.shape[-1]
    identity = torch.eye(size, dtype=base.dtype).expand_as(base)
    close(module.base.mH @ module.base, identity)
    square = module.base[..., : min(latent.shape[-2:])]
    close(square.mT if latent.shape[-2] < latent.shape[-1] else square, weight)


@each
def test_training_equals_changes_of_base_by_hand(name: str) -> None:
    entry, _, _ = ENTRIES[name]
    model = fxp.transform(Holder(drawn(name, 0)), {"weight": entry})
    site: Any = copy.deepcopy(model.get_submodule("parametrizations.weight"))
    ours = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    theirs = torch.optim.SGD(site.parameters(), lr=0.1, momentum=0.5)
    for step in range(1, 11):
        x, refreshes = drawn(name, 10 + step), model.stats.refreshes
        for optimizer, weight in ((ours, model.weight), (theirs, site())):
            optimizer.zero_grad()
            (x * weight).sum().abs().backward()
        assert model.stats.refreshes == refreshes + 1
        close(model.weight, site())
        got, want = (dict(module.named_parameters())[key].grad for module, key in ((model, PATH), (site, "original")))
        close(got, want)
        ours.step()
        theirs.step()
        if step % 3 == 0:
            with torch.no_grad():
                site.original.copy_(site[0].rebase(site.original))
        close(model.get_buffer("parametrizations.weight.0.base"), site[0].base)
    assert not torch.equal(site[0].base, entry.build(drawn(name, 0)).base)


PATH = "parametrizations.weight.original"


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_long_training_in_single_precision_stays_orthogonal(optimizer: Any) -> None:
    torch.manual_seed(0)
    model = fxp.transform(Holder(torch.randn(6, 6)), {"weight": fxp.orthogonal(rebase_every=5)})
    optimizer = optimizer(model.parameters(), lr=0.05, fused=True)
    for _ in range(400):
        optimizer.zero_grad()
        model(torch.randn(6, 6)).sum().backward()
        optimizer.step()
    assert cat.Orthogonal().build(torch.randn(6, 6)).contains(model.weight.detach())
    assert model.latents()[PATH].tril(-1).abs().max() < 5


def test_only_steps_that_move_the_latent_count() -> None:
    model = fxp.transform(Holder(torch.randn(3, 3)), {"weight": fxp.orthogonal(rebase_every=2)})
    other = torch.nn.Parameter(torch.ones(1))
    stranger, own = torch.optim.SGD([other], lr=0.1), torch.optim.SGD(model.parameters(), lr=0.1)
    bases = []
    for optimizer in (stranger, own, stranger, stranger, own, own):
        own.zero_grad()
        (model(torch.ones(3, 3)).sum() + other.sum()).backward()
        optimizer.step()
        bases.append(model.get_buffer("parametrizations.weight.0.base").clone())
    assert [not torch.equal(*pair) for pair in pairwise(bases)] == [False, False, False, True, False]


def trained(model: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(4, 4)).sum().backward()
        optimizer.step()


def test_a_resumed_run_goes_on_as_it_would_have() -> None:
    def made() -> tuple[Any, Any]:
        torch.manual_seed(7)
        model = fxp.transform(Holder(torch.randn(4, 4)), {"weight": fxp.orthogonal(rebase_every=3)})
        return model, torch.optim.Adam(model.parameters(), lr=0.1)

    model, optimizer = made()
    trained(model, optimizer, range(8))
    first, then = made(), made()
    trained(*first, range(4))
    for source, target in zip(first, then, strict=True):
        target.load_state_dict(copy.deepcopy(source.state_dict()))
    trained(*then, range(4, 8))
    for name, tensor in model.state_dict().items():
        assert torch.equal(then[0].state_dict()[name], tensor), name


def test_checkpoints_without_a_count_are_taken() -> None:
    theirs = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(4, 4))
    ours = fxp.transform(torch.nn.Linear(4, 4), {"weight": fxp.orthogonal(rebase_every=2)})
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_first_in_a_chain_only() -> None:
    model = fxp.transform(Holder(torch.randn(4, 4)), {"weight": fxp.orthogonal(rebase_every=1) >> fxp.scale(2.0)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(4, 4)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.weight @ model.weight.mT, 4 * torch.eye(4), rtol=1e-5, atol=1e-5)
    assert not model.latents()[PATH].tril(-1).any()
    text = r"weight \(rule 'weight'\): OrthogonalMap changes its base, for which it has to be given the latents; put it first"
    with pytest.raises(SpecError, match=text):
        fxp.transform(Holder(torch.randn(4, 4)), {"weight": fxp.transpose() >> fxp.orthogonal(rebase_every=1)})


@pytest.mark.parametrize(
    ("declare", "text"),
    [
        (lambda: fxp.orthogonal(rebase_every=0), r"orthogonal: got rebase_every=0; expected an integer of at least 1"),
        (
            lambda: fxp.orthogonal(map="qr", rebase_every=5),
            r"got rebase_every=5 without a base to change; leave it out, or type use_trivialization=True with one of the maps",
        ),
        (
            lambda: fxp.special_orthogonal(use_trivialization=False, rebase_every=5),
            "special_orthogonal: got rebase_every=5",
        ),
        (lambda: fxp.unitary(map="polar", rebase_every=5), "unitary: got rebase_every=5 without a base"),
        (lambda: fxp.grassmann(rebase_every=True), "grassmann: got rebase_every=True; expected an integer"),
    ],
)
def test_refusals(declare: Any, text: str) -> None:
    with pytest.raises(SpecError, match=text):
        declare()
