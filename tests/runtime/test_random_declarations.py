"""Where it is said how often a map draws: rules, attributes, chains; and what copies, traces and checks make of it."""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,misc,attr-defined,assignment,return-value"

from __future__ import annotations

import copy
import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from runtime.random_maps import (
    STEP,
    N,
    Noisy,
    PerStep,
    Tripled,
    batches,
    eps_after,
    loss_of,
    net,
    same,
)
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import fxparam as fxp
from fxparam.catalogue.noise import NoiseMap
from fxparam.tracer.site import SiteModule
from fxparam.tracer.site_tracing import SiteTracer

# --- where it is said


def test_adopted_parametrizations_are_honoured() -> None:
    given = net()
    register_parametrization(given.a, "weight", PerStep())
    register_parametrization(given.b, "weight", Noisy())
    model = fxp.transform(given)
    assert [row.layer for row in model.report.sites] == ["call", "per read"]
    assert torch.equal(model.a.weight, model.a.weight) and not torch.equal(model.b.weight, model.b.weight)
    assert "step" not in given.a.parametrizations.weight[0].__dict__


def test_an_extended_parametrization_keeps_what_it_says() -> None:
    given = net()
    register_parametrization(given.a, "weight", PerStep())
    register_parametrization(given.b, "weight", Tripled())
    model = fxp.transform(
        given,
        {
            "a.weight": fxp.existing() >> fxp.mask(density=0.5),
            "b.weight": fxp.existing() >> fxp.custom(Noisy(), resample="step"),
        },
    )
    assert [row.layer for row in model.report.sites] == ["call", "call"]
    assert torch.equal(model.a.weight, model.a.weight) and torch.equal(model.b.weight, model.b.weight)


def test_an_attribute_set_later_counts() -> None:
    model = fxp.transform(net(), {"a.weight": Noisy()})
    assert not torch.equal(model.a.weight, model.a.weight)
    model.a.parametrizations["weight"][0].resample = "step"
    model.invalidate()
    assert torch.equal(model.a.weight, model.a.weight)


def test_an_attribute_of_that_name_for_something_else_is_left_alone() -> None:
    class Resampling(Noisy):
        def resample(self) -> None:
            """A method of the user's."""

    given = net()
    register_parametrization(given.a, "weight", Noisy())
    given.a.parametrizations.weight[0].resample = "bilinear"
    model = fxp.transform(given, {"b.weight": Resampling()})
    assert [row.layer for row in model.report.sites] == ["per read", "per read"]


@pytest.mark.parametrize("value", ["epoch", "Step", 1, True])
def test_another_value_is_refused(value: Any) -> None:
    with pytest.raises(fxp.SpecError, match=rf"custom: got resample={value!r}; expected one of 'call', 'step'"):
        fxp.custom(Noisy(), resample=value)


def test_another_value_of_an_attribute_is_refused() -> None:
    noisy = Noisy()
    noisy.resample = "steps"
    with pytest.raises(
        fxp.SpecError, match=r"a.weight \(rule 'a.weight'\): Noisy: got resample='steps'; expected one of 'call',"
    ):
        fxp.transform(net(), {"a.weight": noisy})


def test_a_rule_overrules_the_attribute() -> None:
    model = fxp.transform(
        net(), {"a.weight": fxp.custom(PerStep(), resample="call"), "b.weight": fxp.custom(PerStep(), resample="step")}
    )
    assert [row.layer for row in model.report.sites] == ["per read", "call"]
    assert repr(fxp.custom(Noisy(), resample="step")) == "custom(Noisy, resample='step')"


# --- chains, joint rules, references


@pytest.mark.parametrize("order", ["first", "last"])
def test_a_chain_is_drawn_as_a_whole(order: str) -> None:
    """The noise goes where its map stands, and a map that does not say how often draws with the one that does."""
    steps = [fxp.custom(Noisy(), resample="step"), Tripled(), Noisy()]
    first, second, third = steps if order == "first" else reversed(steps)
    model = fxp.transform(net(), {"a.weight": fxp.custom(lambda w: w) >> first >> second >> third})
    (latent,) = model.latents().values()
    eps = eps_after(3, (N, N), (N, N))
    torch.manual_seed(3)
    expected = 3 * (latent.detach() + 0.5 * eps[0]) + 0.5 * eps[1]
    for _ in range(2):
        same(model.a.weight.detach(), expected)
    assert model.report.sites[0].reason == STEP


@pytest.mark.parametrize(
    "declared",
    [
        fxp.noise() >> fxp.custom(Noisy(), resample="step"),
        fxp.variational() >> fxp.noise(),
        fxp.variational() >> fxp.mask(density=0.5) >> fxp.custom(Noisy(), resample="call"),
    ],
    ids=repr,
)
def test_a_chain_that_contradicts_itself_is_refused(declared: Any) -> None:
    names = (
        r"(NoiseMap|Noisy) draws random numbers per call and (Noisy|VariationalMap) per step, for one weight; give both the s"
    )
    with pytest.raises(fxp.SpecError, match=rf"a.weight \(rule 'a.weight'\): {names}"):
        fxp.transform(net(), {"a.weight": declared})


def test_a_map_of_several_latents_is_the_first_of_its_chain() -> None:
    with pytest.raises(
        fxp.SpecError, match=r"noise\(\) comes before a map of 2 latents, which can only be the first of its chain"
    ):
        fxp.transform(net(), {"a.weight": fxp.noise() >> fxp.variational()})


def test_an_adopted_chain_that_contradicts_itself_is_refused() -> None:
    given = net()
    calls = PerStep()
    calls.resample = "call"
    register_parametrization(given.a, "weight", calls)
    register_parametrization(given.a, "weight", fxp.noise(resample="step").build(torch.zeros(N, N)))
    with pytest.raises(fxp.SpecError, match=r"weight of Linear: PerStep draws random numbers per call and NoiseMap per step"):
        fxp.transform(given)


def test_a_weight_that_reads_a_random_weight_follows_it() -> None:
    for declared, equal in ((fxp.noise(std=0.5, resample="step"), True), (fxp.noise(std=0.5), False)):
        model = fxp.transform(net(), {"a.weight": declared, "b.weight": fxp.ref("a.weight") >> fxp.custom(lambda w: 2 * w)})
        assert torch.equal(model.b.weight, model.b.weight) == equal
        assert torch.equal(model.b.weight, 2 * model.a.weight) == equal
        loss_of(model, batches()[0]).backward()


def test_a_reader_that_draws_per_call_reads_one_draw_per_step() -> None:
    model = fxp.transform(
        net(), {"a.weight": fxp.noise(std=0.5, resample="step"), "b.weight": fxp.ref("a.weight") >> fxp.custom(Noisy())}
    )
    same(model.a.weight, model.a.weight)
    (latent,) = model.latents().values()
    eps = eps_after(3, (N, N), (N, N))
    model.invalidate()
    torch.manual_seed(3)
    first = model.a.weight.detach()
    same(first, latent.detach() + 0.5 * eps[0])
    same(model.b.weight.detach(), first + 0.5 * eps[1])


def test_joint_weights_share_one_draw() -> None:
    def scaled(v: Tensor) -> tuple[Tensor, Tensor]:
        drawn = v * (1 + torch.randn((), dtype=v.dtype))
        return drawn[: N * N].view(N, N), drawn[N * N :].view(N, N)

    start = torch.arange(2.0 * N * N, dtype=torch.float64)
    declared = fxp.custom(scaled, init=start, resample="step")
    model = fxp.transform(net(), {fxp.joint("a.weight", "b.weight"): declared})
    (eps,) = eps_after(3, ())
    torch.manual_seed(3)
    model(batches()[0])
    same(torch.cat([model.a.weight, model.b.weight]).flatten().detach(), start * (1 + eps))
    assert model.report.sites[0].reason == STEP


def test_tied_weights_share_one_draw() -> None:
    given = net()
    given.b.weight = given.a.weight
    model = fxp.transform(given, {"a.weight": fxp.noise(std=0.5, resample="step")})
    same(model.a.weight, model.b.weight)


def test_sites_with_hooks_are_drawn_once_per_step_too() -> None:
    model = fxp.transform(net(), {"a.weight": PerStep()})
    model.a.parametrizations["weight"][0].register_forward_hook(lambda module, args, out: 2 * out)
    (latent,) = model.latents().values()
    (eps,) = eps_after(3, (N, N))
    torch.manual_seed(3)
    for _ in range(2):
        same(model.a.weight.detach(), 2 * (latent.detach() + 0.5 * eps))
    assert model.report.sites[0].layer == "call"


def test_an_instance_for_several_weights_draws_for_each() -> None:
    model = fxp.transform(net(), {"*.weight": PerStep()})
    first, second = (latent.detach() for latent in model.latents().values())
    eps = eps_after(3, (N, N), (N, N))
    torch.manual_seed(3)
    same([w.detach() for w in model.weights().values()], [first + 0.5 * eps[0], second + 0.5 * eps[1]])


# --- copies and names


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=list(COPIES))
def test_copies_keep_the_declaration(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = fxp.transform(net(), {"a.weight": fxp.custom(Noisy(), resample="step"), "b.weight": PerStep()})
    twin = copied(model)
    assert [row.reason for row in twin.report.sites] == [STEP, STEP]
    (eps,) = eps_after(3, (N, N))
    torch.manual_seed(3)
    for _ in range(2):
        same(twin.a.weight.detach(), model.latents()["a.parametrizations.weight.original"].detach() + 0.5 * eps)
    assert [site.resamples_per_step for site in (twin.a.parametrizations["weight"], twin.b.parametrizations["weight"])] == [
        True,
        True,
    ]


def test_names_of_the_state_dict_are_those_of_parametrize() -> None:
    given = net()
    eager = copy.deepcopy(given)
    weight = eager.a.weight.detach().clone()
    register_parametrization(eager.a, "weight", fxp.variational().build(weight))
    model = fxp.transform(given, {"a.weight": fxp.variational()})
    assert list(model.state_dict()) == list(eager.state_dict())
    eager.load_state_dict(model.state_dict())
    same(model.state_dict()["a.parametrizations.weight.original0"], weight)
    model.load_state_dict(net().state_dict())


def test_assigning_sets_the_mean() -> None:
    model = fxp.transform(net(), {"a.weight": fxp.variational(init_std=0.1)})
    value = torch.randn(N, N, dtype=torch.float64)
    model.assign("a.weight", value)
    mean, rho = model.latents().values()
    same(mean.detach(), value)
    same(torch.nn.functional.softplus(rho).detach(), torch.full_like(value, 0.1))


# --- what the prologue is told


def _fragment(*steps: nn.Module, train: bool = True, resample: tuple[str, ...] = ()) -> Any:
    site = SiteModule(steps, torch.randn(N, N, dtype=torch.float64), resample=resample).train(train)
    return SiteTracer({}).trace(site, "home", {})


class Steps(nn.Module):
    """Writes a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, w: Tensor) -> Tensor:
        self.count += 1
        return w + self.count


class OwnGenerator(nn.Module):
    """Draws from a generator that no watch sees."""

    resample = "step"

    def __init__(self) -> None:
        super().__init__()
        self.generator = random.Random(0)

    def forward(self, w: Tensor) -> Tensor:
        return w * self.generator.random()


@pytest.mark.parametrize(
    ("steps", "stateful", "volatile"),
    [
        ([Tripled()], False, False),
        ([Noisy()], True, True),
        ([PerStep()], True, False),
        ([PerStep(), Tripled()], True, False),
        ([Steps()], True, False),
        ([OwnGenerator()], True, False),
    ],
    ids=repr,
)
def test_what_may_be_evaluated_again(steps: list[nn.Module], stateful: bool, volatile: bool) -> None:
    fragment = _fragment(*steps)
    assert (fragment.stateful, fragment.volatile) == (stateful, volatile)
    assert (fragment.opaque is None) == (not stateful)


def test_hooked_maps_are_stateful_where_they_draw_or_write() -> None:
    for make, stateful in ((PerStep, True), (Steps, True), (Tripled, False)):
        hooked = make()
        hooked.register_forward_hook(lambda module, args, out: out)
        fragment = _fragment(hooked)
        assert (fragment.opaque, fragment.stateful) == ("0 has hooks", stateful)


def test_nothing_is_random_in_eval_mode() -> None:
    fragment = _fragment(PerStep(), train=False)
    assert (fragment.opaque, fragment.stateful, fragment.volatile) == (None, False, False)


def test_sites_that_differ_in_what_they_say_share_no_trace() -> None:
    model = fxp.transform(
        net(), {"a.weight": fxp.custom(Noisy(), resample="step"), "b.weight": fxp.custom(Noisy(), resample="call")}
    )
    assert [row.layer for row in model.report.sites] == ["call", "per read"]


def test_checking_does_not_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXPARAM_CHECK", "1")
    model = fxp.transform(net(), {"a.weight": PerStep()})
    first = model.a.weight.detach().clone()
    state = torch.get_rng_state()
    same(model.a.weight.detach(), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_schedule_of_the_noise_is_followed() -> None:
    model = fxp.transform(net(), {"a.weight": fxp.noise(std=0.5, resample="step")})
    noisy = model.a.parametrizations["weight"][0]
    assert isinstance(noisy, NoiseMap)
    (latent,) = model.latents().values()
    for std in (0.5, 0.25, 0.0):
        noisy.std = std
        (eps,) = eps_after(3, (N, N))
        torch.manual_seed(3)
        model.invalidate()
        same(model.a.weight.detach(), latent.detach() + std * eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_models_train(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    spec = {"a.weight": fxp.variational(init_std=0.1), "b.weight": fxp.noise(std=0.1, resample="step")}
    model = fxp.transform(net().to(dtype), spec)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for x in batches():
        optimizer.zero_grad()
        loss_of(model, x.to(dtype)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    assert {w.dtype for w in model.weights().values()} == {dtype}


def test_a_compiler_draws_at_each_forward_and_is_right() -> None:
    model = fxp.transform(net(), {"a.weight": fxp.noise(std=0.5, resample="step")})
    (latent,) = model.latents().values()
    with warnings.catch_warnings(action="ignore"):
        compiled = torch.compile(model, backend="eager")
        for seed in range(2):
            (eps,) = eps_after(seed, (N, N))
            plain = net()
            values = {"a.weight": latent.detach() + 0.5 * eps}
            torch.manual_seed(seed)
            same(compiled(batches()[0]), torch.func.functional_call(plain, values, (batches()[0],)))


@pytest.mark.parametrize("resample", ["call", "step"])
def test_retract_and_assign_see_no_noise(resample: str) -> None:
    model = fxp.transform(net(), {"a.weight": fxp.noise(std=0.5, resample=resample)})
    before = {name: latent.detach().clone() for name, latent in model.latents().items()}
    model.retract()
    for name, latent in model.latents().items():
        torch.testing.assert_close(latent.detach(), before[name], rtol=0, atol=0)


class TorchGenerator(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, latent: Tensor) -> Tensor:
        return latent + torch.randn(latent.shape, generator=self.generator, dtype=latent.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def test_a_generator_of_its_own_is_a_draw_as_well() -> None:
    own, other = TorchGenerator(), TorchGenerator()
    model = fxp.transform(net(), {"a.weight": own})
    start = model.get_parameter("a.parametrizations.weight.original").detach()
    for _ in range(3):
        torch.testing.assert_close(model.a.weight.detach(), other(start), rtol=0, atol=0)
    assert model.report.sites[0].layer == "per read"
