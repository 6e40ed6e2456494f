"""What an entry learns from where its weight stands: dimensions of convolutions, seeds, what trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxparam as fxp

KERNELS: dict[str, Any] = {
    "Conv1d": lambda: nn.Conv1d(8, 12, 3),
    "Conv2d": lambda: nn.Conv2d(8, 12, 3, groups=2),
    "Conv3d": lambda: nn.Conv3d(8, 12, 2),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(8, 12, 3),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(8, 12, 3),
    "ConvTranspose3d": lambda: nn.ConvTranspose3d(8, 12, 2),
}
each = pytest.mark.parametrize("name", KERNELS)


def by_outputs(name: str, weight: Tensor) -> Tensor:
    """The kernel as a matrix with a row for each output."""
    return (weight.transpose(0, 1) if "Transpose" in name else weight).flatten(1)


def made(name: str, entry: Any) -> Any:
    torch.manual_seed(3)
    return fxp.transform(KERNELS[name]().double(), {"weight": entry})


@each
def test_statistics_are_those_of_outputs(name: str) -> None:
    for entry in (fxp.centered(), fxp.standardized()):
        rows = by_outputs(name, made(name, entry).weight.detach())
        assert rows.mean(1).abs().max() < 1e-12
    torch.testing.assert_close(rows.var(1, correction=0), torch.ones(len(rows), dtype=rows.dtype), rtol=1e-4, atol=0)


@each
def test_groups_run_along_inputs(name: str) -> None:
    model = made(name, fxp.semi_structured())
    weight = model.weight.detach()
    inputs = weight.movedim(0 if "Transpose" in name else 1, -1)
    assert ((inputs.unflatten(-1, (-1, 4)) != 0).sum(-1) == 2).all()


@each
def test_matrices_have_rows_of_outputs(name: str) -> None:
    rows = by_outputs(name, made(name, fxp.orthogonal() >> fxp.from_matrix()).weight.detach())
    torch.testing.assert_close(rows @ rows.mT, torch.eye(len(rows), dtype=rows.dtype))
    bound = by_outputs(name, made(name, fxp.lipschitz(0.1)).weight.detach())
    torch.testing.assert_close(torch.linalg.matrix_norm(bound, 2), torch.tensor(0.1, dtype=rows.dtype))


@each
@pytest.mark.parametrize("entry", [fxp.low_rank(2), fxp.fixed_rank(2), fxp.lora(2), fxp.dora(2)], ids=str)
def test_ranks_are_those_of_outputs_times_all_else(name: str, entry: Any) -> None:
    model = made(name, entry)
    before, matrix = by_outputs(name, KERNEL_START[name]), by_outputs(name, model.weight.detach())
    shapes = [tuple(latent.shape) for latent in model.latents().values()]
    if entry.name in ("lora", "dora"):
        assert shapes[:2] == [(2, matrix.shape[1]), (matrix.shape[0], 2)]
        torch.testing.assert_close(matrix, before)
    else:
        assert torch.linalg.matrix_rank(matrix) == 2
    # Said by hand it is the same.
    twin = made(name, entry >> fxp.from_matrix())
    assert [tuple(latent.shape) for latent in twin.latents().values()] == shapes
    chained = made(name, entry >> fxp.mask(density=0.5))
    assert [tuple(latent.shape) for latent in chained.latents().values()] == shapes


def _start(name: str) -> Tensor:
    torch.manual_seed(3)
    return KERNELS[name]().double().weight.detach()


KERNEL_START = {name: _start(name) for name in KERNELS}


def test_a_batch_of_matrices_outside_of_a_convolution_is_a_batch() -> None:
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.randn(3, 5, 4))
    model = fxp.transform(holder, {"weight": fxp.low_rank(2)})
    assert [tuple(latent.shape) for latent in model.latents().values()] == [(3, 5, 2), (3, 2, 4)]


def test_the_convolutional_adapter_of_peft_is_the_same_map() -> None:
    peft = pytest.importorskip("peft")
    convolution = nn.Conv2d(4, 6, 3).double()
    start = convolution.weight.detach().clone()
    theirs = peft.get_peft_model(
        nn.Sequential(convolution), peft.LoraConfig(target_modules=["0"], r=2, lora_alpha=3, init_lora_weights=False)
    ).double()
    layer = theirs.base_model.model[0]
    plain = nn.Conv2d(4, 6, 3).double()
    plain.load_state_dict({"weight": start, "bias": convolution.bias})
    model = fxp.transform(plain, {"weight": fxp.lora(2, alpha=3)})
    a, b = model.latents().values()
    with torch.no_grad():
        a.copy_(layer.lora_A["default"].weight.flatten(1))
        b.copy_(layer.lora_B["default"].weight.flatten(1))
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(model(x), theirs(x))


def test_random_patterns_differ_from_layer_to_layer_and_repeat_from_run_to_run() -> None:
    def masks() -> list[Tensor]:
        net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
        model = fxp.transform(net, {"*.weight": fxp.mask(density=0.5, by="random")})
        return [model.get_buffer(f"{layer}.parametrizations.weight.0.mask") for layer in range(3)]

    first, again = masks(), masks()
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])


@pytest.mark.parametrize("entry", [fxp.hypernetwork(), fxp.scale(trainable=True), fxp.subspace(3)], ids=str)
def test_frozen_weights_stay(entry: Any) -> None:
    net = nn.Linear(4, 4)
    net.weight.requires_grad_(False)
    model = fxp.transform(net, {"weight": entry})
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["bias"]


@pytest.mark.parametrize("entry", [fxp.hypernetwork(), fxp.scale(trainable=True), fxp.lora(2)], ids=str)
def test_freezing_freezes_all_that_computes_a_weight(entry: Any) -> None:
    model = fxp.transform(nn.Linear(4, 4), {"weight": entry})
    behind = sorted(name for name, _ in model.named_parameters() if name != "bias")
    assert sorted(model.freeze("weight")) == behind
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = model.weight.detach().clone()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(model.weight, before)
    assert sorted(model.unfreeze("weight")) == behind
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_modules_of_the_user_are_left_as_they_are() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, latent: Tensor) -> Tensor:
            return latent * self.factor

    net = nn.Linear(4, 4)
    net.weight.requires_grad_(False)
    own = Own()
    fxp.transform(net, {"weight": own})
    assert own.factor.requires_grad


def test_a_plain_checkpoint_beside_an_adapter_is_told_to_come_earlier() -> None:
    model = fxp.transform(nn.Linear(6, 6), {"weight": fxp.lora(2)})
    with pytest.raises(fxp.ImageError, match=r"load the weight before transform, so that it becomes W0"):
        model.load_state_dict(nn.Linear(6, 6).state_dict())


def largest(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach().flatten(1), 2))


class Pair(nn.Module):
    """Two weights of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8).double(), nn.Linear(8, 8).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


BEFORE: dict[str, Any] = {
    "ref": fxp.ref("b.weight") >> fxp.scale(30.0),
    "kronecker": fxp.kronecker((2, 4)),
    "positive": fxp.positive(),
    "symmetric": fxp.symmetric(),
    "orthogonal": fxp.orthogonal(),
    "mask": fxp.mask(density=0.2),
    "function": fxp.custom(lambda latent: 7 * latent.mT.exp()),
}


@pytest.mark.parametrize("name", BEFORE)
def test_spectral_norm_measures_what_it_is_given(name: str) -> None:
    torch.manual_seed(1)
    model = fxp.transform(Pair(), {"a.weight": BEFORE[name] >> fxp.spectral_norm()}).eval()
    assert abs(largest(model.a.weight) - 1) < 0.05


@pytest.mark.parametrize("name", BEFORE)
def test_magnitudes_are_those_of_what_is_masked(name: str) -> None:
    torch.manual_seed(1)
    model = fxp.transform(Pair(), {"a.weight": BEFORE[name] >> fxp.mask(density=0.15)}).eval()
    value = model.a.weight.detach()
    plain = fxp.transform(Pair(), {"a.weight": BEFORE[name]}).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    given = plain.a.weight.detach()
    assert value.count_nonzero() == 10
    assert torch.equal(value[value != 0], given[value != 0])
    assert given.abs()[value != 0].min() >= given.abs()[value == 0].max()


def test_a_chain_of_masks_keeps_what_the_last_one_says() -> None:
    chain = fxp.mask(density=0.5, by="random") >> fxp.mask(density=0.25)
    model = fxp.transform(Pair(), {"a.weight": chain})
    assert int(model.a.weight.count_nonzero()) == 16


@pytest.mark.parametrize("entry", [fxp.lora(2), fxp.gate(), fxp.weight_norm(), fxp.learned_step()], ids=str)
def test_maps_with_several_latents_come_first(entry: Any) -> None:
    text = r"a\.weight \(rule 'a\.weight'\): .* has \d latents and is given 1 of them here; put it first in its chain"
    with pytest.raises(fxp.SpecError, match=text):
        fxp.transform(Pair(), {"a.weight": fxp.ref("b.weight") >> entry})
    with pytest.raises(fxp.SpecError, match=r"scale\(factor=2.0\) comes before a map of \d latents"):
        fxp.transform(Pair(), {"a.weight": fxp.ref("b.weight") >> fxp.scale(2.0) >> entry})
    net = Pair()
    torch.nn.utils.parametrizations.orthogonal(net.a)
    with pytest.raises(fxp.SpecError, match=text):
        fxp.transform(net, {"a.weight": fxp.existing() >> entry})


def test_weights_without_values_are_refused() -> None:
    with torch.device("meta"):
        net = nn.Linear(4, 4)
    with pytest.raises(fxp.SpecError, match=r"weight is on the meta device and has no values; type model\.to_empty"):
        fxp.transform(net, {"weight": fxp.weight_norm()})


OWN_PARAMETERS: dict[str, Any] = {
    "hypernetwork": {"0.weight": fxp.hypernetwork()},
    "scale": {"0.weight": fxp.scale(trainable=True)},
    "behind a ref": {"0.weight": fxp.ref("1.weight") >> fxp.scale(trainable=True)},
    "joint": {fxp.joint("*.weight"): fxp.hypernetwork()},
}


@pytest.mark.parametrize("name", OWN_PARAMETERS)
def test_an_optimizer_built_before_trains_parameters_of_maps(name: str) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    model = fxp.transform(net, OWN_PARAMETERS[name], optimizer=optimizer)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert {id(parameter) for parameter in model.parameters()} == held
    before = model[0].weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_an_optimizer_of_an_extended_weight_trains_the_extension_and_keeps_its_state() -> None:
    net = nn.Linear(4, 4)
    torch.nn.utils.parametrizations.weight_norm(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    net(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    model = fxp.transform(net, {"weight": fxp.existing() >> fxp.scale(trainable=True)}, optimizer=optimizer)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in model.parameters()} == set(map(id, held)) and len(held) == 5
    assert len(optimizer.state) == 3


def test_joint_weights_of_which_some_are_frozen_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[0].weight.requires_grad_(False)
    with pytest.raises(fxp.SpecError, match=r"1 of 2 weights are frozen \(0\.weight\) and would be trained with the others"):
        fxp.transform(net, {fxp.joint("*.weight"): fxp.subspace(5)})
    net[1].weight.requires_grad_(False)
    model = fxp.transform(net, {fxp.joint("*.weight"): fxp.subspace(5)})
    assert not any(latent.requires_grad for latent in model.latents().values())
