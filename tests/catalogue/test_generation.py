"""Mixtures of checkpoints, hypernetworks, a user's own generating modules, and weights that are functions of others."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from catalogue.cases.generation import network
from torch import Tensor, nn

import fxparam as fxp
from fxparam.catalogue import Hypernetwork, Mixture
from fxparam.errors import ImageError, MissingExtraError, SpecError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu())


def nets(count: int) -> list[Net]:
    return [Net() for _ in range(count)]


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def train(model: nn.Module, x: Tensor, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


# --- mixtures


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("joint", [True, False])
def test_a_soup_of_files(tmp_path: Path, suffix: str, joint: bool) -> None:
    """From a spec file: values and gradients are those of the plain model with the mixed weights."""
    givers, net, x = nets(3), Net(), torch.randn(5, 4)
    paths = []
    for number, giver in enumerate(givers):
        paths.append(str(tmp_path / f"{number}{suffix}"))
        if suffix == ".pt":
            torch.save(giver.state_dict(), paths[-1])
        else:
            from safetensors.torch import save_file

            save_file(giver.state_dict(), paths[-1])
    spec = fxp.Spec({fxp.joint("*") if joint else "*": fxp.mixture(paths)})
    spec.save(tmp_path / "spec.yaml")
    model = fxp.transform(net, fxp.Spec.load(tmp_path / "spec.yaml"))
    assert len(list(model.parameters())) == (1 if joint else 4)
    own = torch.tensor([0.5, 0.25, -0.5], requires_grad=True)
    with torch.no_grad():
        for latent in model.parameters():
            latent.copy_(own)
    mixed = {name: sum(c * g.state_dict()[name] for c, g in zip(own, givers, strict=True)) for name in net.state_dict()}
    out, expected = model(x), torch.func.functional_call(net, mixed, (x,))
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    total = sum(latent.grad for latent in model.parameters())  # type: ignore[misc]
    torch.testing.assert_close(total, own.grad)
    assert not [node for node in model.prologue.graph.nodes if node.op == "call_module"]
    torch.testing.assert_close(fxp.fold(model, example_inputs=(x,))(x), expected)


def test_a_mixture_starts_at_the_nearest_one() -> None:
    givers, net = nets(3), Net()
    model = fxp.transform(net, {fxp.joint("*"): fxp.mixture([state(giver) for giver in givers])})
    (latent,) = model.parameters()
    rows = torch.stack([torch.cat([t.flatten() for t in giver.state_dict().values()]) for giver in givers]).double()
    wanted = torch.cat([t.flatten() for t in net.state_dict().values()]).double()
    torch.testing.assert_close(latent.double(), torch.linalg.pinv(rows.mT) @ wanted, rtol=0, atol=1e-5)
    assert "not in the image" in model.report.sites[0].start
    again = fxp.transform(givers[1], {fxp.joint("*"): fxp.mixture([state(giver) for giver in givers])})
    (latent,) = again.parameters()
    torch.testing.assert_close(latent.detach(), torch.tensor([0.0, 1.0, 0.0]), rtol=0, atol=1e-5)
    assert "weight kept" in again.report.sites[0].start


def test_with_an_origin_the_weight_is_kept_and_tasks_are_added() -> None:
    base, tasks, x = Net(), nets(2), torch.randn(3, 4)
    model = fxp.transform(base, {fxp.joint("*"): fxp.mixture([state(task) for task in tasks], origin=True)})
    (latent,) = model.parameters()
    assert not latent.any() and torch.equal(model(x), base(x))
    with torch.no_grad():
        latent.copy_(torch.tensor([0.7, -0.3]))
    start = base.state_dict()
    added = {
        name: start[name]
        + 0.7 * (tasks[0].state_dict()[name] - start[name])
        - 0.3 * (tasks[1].state_dict()[name] - start[name])
        for name in start
    }
    torch.testing.assert_close(model(x), torch.func.functional_call(base, added, (x,)))


def test_normalized_coefficients_are_fractions_that_train() -> None:
    ingredients = [torch.randn(4, 3) for _ in range(3)]
    module: Any = Mixture(ingredients, normalize=True).build(torch.zeros(4, 3))
    inside = 0.2 * ingredients[0] + 0.5 * ingredients[1] + 0.3 * ingredients[2]
    torch.testing.assert_close(module.right_inverse(inside).exp(), torch.tensor([0.2, 0.5, 0.3]))
    # An ingredient itself is a limit, and counts as in the image.
    torch.testing.assert_close(module(module.right_inverse(ingredients[1])), ingredients[1])
    outside = 2 * ingredients[0] - ingredients[1]
    with pytest.raises(ImageError, match="the set of mixtures with positive coefficients of sum 1 of 3 checkpoints is missed"):
        module.right_inverse(outside)
    start = module.start(outside)
    assert start.exp().amin() > 0.003 and abs(float(start.exp().sum()) - 1) < 1e-6
    assert start.argmax() == 0


def test_the_nearest_fractions_are_those_of_a_search() -> None:
    ingredients = torch.randn(3, 7, dtype=torch.float64)
    for _ in range(10):
        wanted = 2 * torch.randn(7, dtype=torch.float64)
        module: Any = Mixture(list(ingredients), normalize=True).build(wanted)
        near = module.project(wanted)
        steps = torch.linspace(0, 1, 201, dtype=torch.float64)
        first, second = (one.flatten() for one in torch.meshgrid(steps, steps, indexing="ij"))
        grid = torch.stack([first, second, 1 - first - second], 1)[first + second <= 1]
        best = torch.linalg.vector_norm(grid @ ingredients - wanted, dim=1).amin()
        got = torch.linalg.vector_norm(near - wanted)
        assert best - 0.02 < got <= best + 1e-9
        assert module.contains(near)


def test_equal_ingredients_share_what_one_would_get() -> None:
    one = torch.randn(5, dtype=torch.float64)
    module = Mixture([one, one]).build(one)
    torch.testing.assert_close(module.right_inverse(one), torch.tensor([0.5, 0.5], dtype=torch.float64))
    fractions = Mixture([one, one, one + 1], normalize=True).build(one)
    torch.testing.assert_close(fractions(fractions.right_inverse(one)), one)


def test_a_saved_mixture_brings_its_ingredients() -> None:
    saved = fxp.transform(Net(), {fxp.joint("*"): fxp.mixture([state(net) for net in nets(2)])})
    other = fxp.transform(Net(), {fxp.joint("*"): fxp.mixture([state(net) for net in nets(2)])})
    x = torch.randn(3, 4)
    assert not torch.allclose(other(x), saved(x))
    other.load_state_dict(saved.state_dict())
    assert torch.equal(other(x), saved(x))
    three = fxp.transform(Net(), {fxp.joint("*"): fxp.mixture([state(net) for net in nets(3)])})
    with pytest.raises(RuntimeError, match=r"size mismatch for .*ingredients"):
        three.load_state_dict(saved.state_dict())


def test_names_in_the_checkpoint_may_be_other_ones() -> None:
    ingredients = [{"encoder.kernel": torch.full((2,), float(number))} for number in (1, 3)]
    module = Mixture(ingredients, names=["encoder.kernel"]).build(torch.zeros(2))
    assert torch.equal(module(torch.tensor([1.0, 2.0])), torch.tensor([7.0, 7.0]))
    layer = nn.Linear(2, 1, bias=False)
    model = fxp.transform(layer, {"weight": fxp.mixture([{"k": torch.ones(1, 2)}], names=["k"])})
    model.assign("weight", torch.full((1, 2), 4.0))
    torch.testing.assert_close(next(model.parameters()).detach(), torch.tensor([4.0]))


def test_ingredients_are_copied() -> None:
    one = torch.ones(3)
    entry = Mixture([one])
    module = entry.build(torch.ones(3))
    one.fill_(5)
    assert torch.equal(module.ingredients, torch.ones(1, 3))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Mixture([]), r"mixture: got checkpoints=\[\]; expected a list of state dicts, paths or tensors"),
        (lambda: Mixture("a.pt"), r"mixture: got checkpoints='a.pt'; expected a list"),
        (lambda: Mixture(torch.ones(2, 2)), r"mixture: got checkpoints=tensor of shape \(2, 2\); expected a list"),  # type: ignore[arg-type]
        (lambda: Mixture([3]), r"mixture: got the checkpoint 3; expected a state dict, a path, a tensor, or nested lists"),  # type: ignore[list-item]
        (lambda: Mixture([["a"]]), r"mixture: got 'a' in a checkpoint; expected a tensor, or nested lists of numbers"),
        (lambda: Mixture([[1.0]], normalize="yes"), r"mixture: got normalize='yes'; expected True or False"),  # type: ignore[arg-type]
        (lambda: Mixture([[1.0]], normalize=True, origin=True), r"steps of sum 1 cancel the origin: give one of them"),
    ],
)
def test_bad_options(make: Any, text: str) -> None:
    with pytest.raises(SpecError, match=text):
        make()


@pytest.mark.parametrize(
    ("checkpoint", "text"),
    [
        (
            torch.ones(3),
            r"got a tensor of shape \(3,\) from the checkpoint tensor of shape \(3,\) for a weight of shape \(2,\)",
        ),
        ([1.0, math.nan], r"the checkpoint \[1.0, nan\] holds NaN or infinity; repair it first"),
        ([[1.0], [1.0, 2.0]], r"nested lists that are no tensor"),
        (torch.ones(2, dtype=torch.int64), r"got a tensor of dtype torch.int64 from the checkpoint"),
        ({"weights": torch.ones(2)}, r"no tensor 'weight' in the checkpoint state dict of 1 tensors; did you mean weights\?"),
        ({"q": torch.ones(2)}, r"no tensor 'weight' .*; it has q; type names=\[\.\.\.\]"),
        ("nowhere.pt", r"no file 'nowhere.pt'; expected the path of a safetensors or torch file"),
    ],
)
def test_checkpoints_that_do_not_fit(checkpoint: Any, text: str) -> None:
    with pytest.raises(SpecError, match=text):
        Mixture([checkpoint], names=["weight"]).build(torch.ones(2))


def test_files_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.ones(2)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(SpecError, match=r"list.pt' holds a list; expected a state dict"):
        Mixture([tmp_path / "list.pt"], names=["weight"]).build(weight)
    torch.save(Net(), tmp_path / "code.pt")
    with pytest.raises(SpecError, match=r"code.pt' is no file of tensors only"):
        Mixture([tmp_path / "code.pt"], names=["weight"]).build(weight)
    (tmp_path / "a.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(MissingExtraError, match=r"safetensors is needed to read safetensors files"):
        Mixture([tmp_path / "a.safetensors"], names=["weight"]).build(weight)


def test_several_weights_need_named_checkpoints() -> None:
    pair = (torch.ones(2), torch.ones(3))
    with pytest.raises(SpecError, match=r"got the checkpoint tensor of shape \(2,\) for 2 weights; expected a state dict"):
        Mixture([torch.ones(2)]).build_joint(pair)
    with pytest.raises(SpecError, match=r"got 0 names for 2 weights; type names=\[\.\.\.\]"):
        Mixture([{"a": torch.ones(2)}]).build_joint(pair)


def test_only_paths_and_numbers_can_be_written_to_a_file(tmp_path: Path) -> None:
    entry = Mixture([tmp_path / "a.pt", "b.pt"], normalize=True)
    again = Mixture(**yaml.safe_load(yaml.safe_dump(entry.options())))
    assert again == entry and hash(again) == hash(entry)
    for given in (torch.ones(2), {"a": torch.ones(2)}):
        held = Mixture([given])
        with pytest.raises(
            SpecError, match=r"mixture: a checkpoint is a .*, and tensors cannot be written to a spec file; save"
        ):
            held.options()
        assert held == Mixture([copy.deepcopy(given)]) and held != Mixture([torch.zeros(2)]) and held != entry
    assert repr(Mixture([torch.ones(2)], origin=True)) == "mixture([tensor of shape (2,)], origin=True)"
    assert repr(Mixture([{"a": torch.ones(2)}, "b.pt"])) == "mixture([state dict of 1 tensors, 'b.pt'])"


# --- hypernetworks


def shaken(module: Any) -> Any:
    """As after training: no parameter is zero any more."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) / 2)
    return module


@pytest.mark.parametrize(
    ("entry", "shape"),
    [
        (Hypernetwork(dim=3, hidden=(5, 4), chunk=4), (3, 5)),
        (Hypernetwork(dim=2, hidden=(), seed=3), (7,)),
        (Hypernetwork(dim=1, hidden=(3,), chunk=12), (3, 2, 2)),
    ],
    ids=str,
)
def test_a_trained_network_makes_the_weights(entry: Hypernetwork, shape: tuple[int, ...]) -> None:
    module: Any = shaken(entry.build(torch.randn(shape, dtype=torch.float64)))
    latent = torch.randn(module.embeddings, dtype=torch.float64, requires_grad=True)
    inputs = (latent, *module.parameters())
    made, expected = module(latent), network(module, latent)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-12)
    direction = torch.randn(shape, dtype=torch.float64)
    for got, wanted in zip(
        torch.autograd.grad((made * direction).sum(), inputs),
        torch.autograd.grad((expected * direction).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda z: module(z), latent)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_right_inverse_moves_the_origin(dtype: torch.dtype) -> None:
    module: Any = shaken(Hypernetwork(hidden=(5,), chunk=7).build(torch.randn(4, 6).to(dtype)))
    weight = torch.randn(4, 6).to(dtype)
    latent = module.right_inverse(weight)
    assert latent.dtype == dtype
    torch.testing.assert_close(module(latent), weight, rtol=0, atol=8 * torch.finfo(dtype).eps * 4)
    assert torch.equal(module.right_inverse(weight), latent)


def test_by_default_network_and_embeddings_are_small() -> None:
    module = Hypernetwork().build(torch.randn(300, 400))
    assert module.embeddings == (346, 8)
    assert sum(parameter.numel() for parameter in module.parameters()) + 346 * 8 < 300 * 400 / 4


def test_the_seed_draws_the_start_and_nothing_else_does() -> None:
    before = torch.get_rng_state()
    weight = torch.zeros(6, 5)
    first, same, other = (Hypernetwork(seed=seed).build(weight) for seed in (1, 1, 2))
    assert torch.equal(first.right_inverse(weight), same.right_inverse(weight))
    assert not torch.equal(first.right_inverse(weight), other.right_inverse(weight))
    assert torch.equal(first.weights[0], same.weights[0]) and not torch.equal(first.weights[0], other.weights[0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("joint", [True, False])
def test_a_hypernetwork_in_a_model(joint: bool) -> None:
    net, x = Net(), torch.randn(5, 4)
    model = fxp.transform(net, {fxp.joint("*") if joint else "*": fxp.hypernetwork(dim=2, hidden=(7,))})
    assert torch.equal(model(x), net(x))
    train(model, x, 3)
    assert not torch.allclose(model(x), net(x))
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    assert not [node for node in model.prologue.graph.nodes if node.op == "call_module"]
    # Against the maps themselves, evaluated as Python.
    made: dict[str, Tensor] = {}
    for site in model.sites:
        home: Any = model.get_submodule(site.home)
        values = home()
        made |= dict(zip(site.names, values if isinstance(values, tuple) else (values,), strict=True))
    torch.testing.assert_close(model(x), torch.func.functional_call(net, made, (x,)))
    torch.testing.assert_close(fxp.fold(model, example_inputs=(x,))(x), model.eval()(x))
    twin = fxp.transform(Net(), {fxp.joint("*") if joint else "*": fxp.hypernetwork(dim=2, hidden=(7,), seed=5)})
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin.eval()(x), model(x))
    wanted = torch.randn(6, 4)
    if not joint:
        model.assign("one.weight", wanted)
        torch.testing.assert_close(model.one.weight, wanted)


def test_places_start_with_networks_of_their_own() -> None:
    model: Any = fxp.transform(Net(), {"*.weight": fxp.hypernetwork(hidden=(3,), chunk=4)})
    one, two = (model.get_submodule(site.home)[0] for site in model.sites)
    assert not torch.equal(one.weights[0], two.weights[0])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dim": 0}, r"hypernetwork: got dim=0; expected an integer of at least 1"),
        ({"hidden": 64}, r"hypernetwork: got hidden=64; expected the sizes of hidden layers, such as \(64,\)"),
        ({"hidden": (4, 0)}, r"hypernetwork: got hidden=0; expected an integer of at least 1"),
        ({"chunk": 0}, r"hypernetwork: got chunk=0; expected an integer of at least 1"),
        ({"seed": 2**32}, r"hypernetwork: got seed=4294967296; expected an integer below 2\*\*32"),
    ],
)
def test_bad_options_of_a_hypernetwork(options: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        Hypernetwork(**options)


def test_a_chunk_must_fit() -> None:
    with pytest.raises(SpecError, match=r"hypernetwork: got chunk=13 for 12 elements; expected 1 <= chunk <= 12"):
        Hypernetwork(chunk=13).build(torch.zeros(3, 4))


class Generator(nn.Module):
    """A user's own module that makes all weights of ``Net`` from one latent."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 58))

    def forward(self, latent: Tensor) -> tuple[Tensor, ...]:
        one, bias, two, other = self.body(latent).split([24, 6, 24, 4])
        return one.reshape(6, 4), bias, two.reshape(4, 6), other


def test_a_module_of_ones_own_generates_a_model() -> None:
    net, generator, z, x = Net(), Generator(), torch.randn(3), torch.randn(5, 4)
    own, reference = z.clone().requires_grad_(), copy.deepcopy(generator)
    model = fxp.transform(net, {fxp.joint("*"): fxp.custom(generator, init=z)})
    assert len(list(model.parameters())) == 5
    optimizers = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD([own, *reference.parameters()], 0.1)
    for _ in range(3):
        made = dict(zip(net.state_dict(), reference(own), strict=True))
        got, expected = model(x), torch.func.functional_call(net, made, (x,))
        torch.testing.assert_close(got, expected)
        for optimizer, out in zip(optimizers, (got, expected), strict=True):
            optimizer.zero_grad()
            out.square().sum().backward()
        norms = [
            sorted(float(p.grad.norm()) for p in parameters if p.grad is not None)
            for parameters in (model.parameters(), [own, *reference.parameters()])
        ]
        assert len(norms[0]) == 5
        torch.testing.assert_close(norms[0], norms[1], rtol=1e-4, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()
    assert not [node for node in model.prologue.graph.nodes if node.op == "call_module"]


# --- one vector, and weights that are functions of others


def test_a_model_as_one_flat_vector() -> None:
    net, x = Net(), torch.randn(5, 4)
    model = fxp.transform(net, {fxp.joint("*"): fxp.flat()})
    (vector,) = model.parameters()
    assert vector.shape == (58,) and torch.equal(model(x), net(x))
    for out in (model(x), net(x)):
        out.square().sum().backward()
    torch.testing.assert_close(vector.grad, torch.cat([p.grad.flatten() for p in net.parameters()]))  # type: ignore[union-attr]
    # What a flat vector is for: an optimizer over one tensor, with a step of its own.
    with torch.no_grad():
        for parameter in (vector, *net.parameters()):
            assert parameter.grad is not None
            parameter.sub_(0.1 * parameter.grad)
    torch.testing.assert_close(model(x), net(x))
    torch.testing.assert_close(fxp.fold(model, example_inputs=(x,))(x), net(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


def test_an_affine_function_of_another_weight() -> None:
    net, x = Tied(), torch.randn(3, 5)
    model: Any = fxp.transform(net, {"b.weight": fxp.ref("a.weight") >> fxp.scale(2.0, 0.5, trainable=True)})
    factor, shift = torch.tensor(2.0, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    weight = net.a.weight.detach().clone().requires_grad_()
    named = dict(net.named_parameters())
    own = [weight, factor, shift]
    trained = {name: parameter for name, parameter in model.named_parameters() if "bias" not in name}
    assert sorted(name.rpartition(".")[2] for name in trained) == ["factor", "shift", "weight"]
    optimizers = torch.optim.SGD(trained.values(), 0.1), torch.optim.SGD(own, 0.1)
    for _ in range(3):
        values = {**named, "a.weight": weight, "b.weight": factor * weight + shift}
        outs = model(x), torch.func.functional_call(net, values, (x,))
        torch.testing.assert_close(*outs)
        for optimizer, out in zip(optimizers, outs, strict=True):
            optimizer.zero_grad()
            out.square().sum().backward()
        ours = {name.rpartition(".")[2]: parameter.grad for name, parameter in trained.items()}
        torch.testing.assert_close([ours["weight"], ours["factor"], ours["shift"]], [one.grad for one in own])
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(fxp.fold(model, example_inputs=(x,))(x), model.eval()(x))


def test_a_reference_alone_ties() -> None:
    net, x = Tied(), torch.randn(3, 5)
    model = fxp.transform(net, {"b.weight": fxp.ref("a.weight")})
    weight = net.a.weight.detach().clone().requires_grad_()
    values = {**dict(net.named_parameters()), "a.weight": weight, "b.weight": weight}
    outs = model(x), torch.func.functional_call(net, values, (x,))
    torch.testing.assert_close(*outs)
    for out in outs:
        out.square().sum().backward()
    (got,) = (parameter for name, parameter in model.named_parameters() if name.endswith("weight"))
    torch.testing.assert_close(got.grad, weight.grad)
    folded = fxp.fold(model, example_inputs=(x,))
    torch.testing.assert_close(folded(x), outs[0])


def test_a_reference_into_a_subspace() -> None:
    """A chain of both kinds: one weight moves in a subspace, another is a multiple of it."""
    net, x = Tied(), torch.randn(3, 5)
    spec = {"a.weight": fxp.subspace(4, "fastfood"), "b.weight": fxp.ref("a.weight") >> fxp.scale(-1.5)}
    model: Any = fxp.transform(net, spec)
    train(model, x, 3)
    torch.testing.assert_close(model.b.weight, -1.5 * model.a.weight)
    moved = model.a.weight.detach() - net.a.weight.detach()
    matrix = model.get_submodule("a.parametrizations.weight")[0].projection.matrix(torch.float32)
    latent = model.get_submodule("a.parametrizations.weight").original.detach()
    assert moved.any()
    torch.testing.assert_close(moved.flatten(), matrix @ latent, rtol=0, atol=1e-6)
