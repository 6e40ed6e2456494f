"""``fold``, ``restore``, ``diff`` and export against the plain model they promise to give back."""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrizations as stock
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization

import fxparam as fxp

N = 6


class Doubled(nn.Module):
    def forward(self, latent: Tensor) -> Tensor:
        return latent * 2

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(N, N), nn.Linear(N, N, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3), nn.ConvTranspose1d(3, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x.unsqueeze(1))).relu())


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.LSTM(N, N, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x.unsqueeze(1))[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.MultiheadAttention(N, 2, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        y = x.unsqueeze(0)
        return self.a(y, y, y)


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Embedding(10, N), nn.Linear(N, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.abs().mul(3).long().clamp(0, 9)))


class Tied(Embedding):
    def __init__(self) -> None:
        super().__init__()
        self.b.weight = self.a.weight


class SharedModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(N, N)
        self.again = self.a
        self.layers = nn.Sequential(self.a, nn.Tanh(), self.a)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.again(x))


class ReadsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(N, N)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.a(x), self.a.weight)


class Normed(nn.Module):
    """Weight arithmetic of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(N, N)
        self.alphas = nn.Parameter(torch.rand(3))
        self.register_buffer("scale", torch.rand(N))

    def forward(self, x: Tensor) -> Tensor:
        w = F.normalize(self.a.weight, dim=1) * self.scale.exp()
        alphas = self.alphas.softmax(0)
        return F.linear(x, w, self.a.bias) * alphas[0] + x * alphas[1]


class Standardized(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2), keepdim=True)) / (w.std((1, 2), keepdim=True) + 1e-5)
        return F.conv1d(x, w, self.bias)


class StandardizedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Standardized(1, 3, 3), nn.Linear(N - 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.unsqueeze(1)))


class Bare(nn.Module):
    """Parameters of the root itself, of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.rand(N, N))
        self.layers = nn.ParameterList([nn.Parameter(torch.rand(N)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a * self.layers[0] + self.layers[1]


SPECS: dict[type[nn.Module], str] = {
    Mlp: "*.weight",
    Conv: "[ab].weight",
    Lstm: "a.weight_hh_l*",
    Attention: "a.in_proj_weight",
    Embedding: "*.weight",
    Tied: "a.weight",
    SharedModule: "a.weight",
    ReadsWeight: "a.weight",
    Normed: "a.weight",
    StandardizedNet: "*.weight",
    Bare: "a",
}


def by_spec(net: nn.Module) -> nn.Module:
    return fxp.transform(net, {SPECS[type(net)]: Doubled()})


def by_parametrize(net: nn.Module) -> nn.Module:
    for name, parameter in list(net.named_parameters()):
        owner = net.get_submodule(name.rpartition(".")[0])
        if parameter.dim() > 1 and not isinstance(net, Tied):
            register_parametrization(owner, name.rpartition(".")[2], Doubled())
    return fxp.transform(net)


def by_weight_norm(net: nn.Module) -> nn.Module:
    return fxp.transform(stock.weight_norm(net.a, "weight") and net)


def by_legacy_weight_norm(net: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(net.a, "weight")
    return fxp.transform(net)


def by_spectral_norm(net: nn.Module) -> nn.Module:
    stock.spectral_norm(net.a, "weight")
    return fxp.transform(net)


def by_legacy_spectral_norm(net: nn.Module) -> nn.Module:
    torch.nn.utils.spectral_norm(net.a, "weight")
    return fxp.transform(net)


def by_prune(net: nn.Module) -> nn.Module:
    prune.l1_unstructured(net.a, "weight", 0.5)
    return fxp.transform(net)


def by_spec_on_parametrized(net: nn.Module) -> nn.Module:
    register_parametrization(net.a, "weight", Doubled())
    return fxp.transform(net, {"a.weight": fxp.existing() >> fxp.custom(lambda w: w.tanh())})


@dataclass(frozen=True)
class Case:
    net: type[nn.Module]
    by: Callable[[nn.Module], nn.Module]

    def __str__(self) -> str:
        return f"{self.net.__name__}-{self.by.__name__}"


ON_LAYER = (
    by_weight_norm,
    by_legacy_weight_norm,
    by_spectral_norm,
    by_legacy_spectral_norm,
    by_prune,
    by_spec_on_parametrized,
)
CASES = (
    *(Case(net, by) for net in SPECS for by in (by_spec, by_parametrize)),
    *(Case(net, by) for net in (Mlp, Conv, ReadsWeight, SharedModule, Normed, StandardizedNet) for by in ON_LAYER),
)
TABLE = [pytest.param(case, id=str(case)) for case in CASES]


def inputs(dtype: torch.dtype = torch.float64, seed: int = 3) -> Tensor:
    return torch.randn(4, N, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def made(case: Case, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, fxp.ParametrizedModule]:
    """The transformed model, after some training, and a plain one of the user's class with the weights it has."""
    torch.manual_seed(0)
    model: Any = case.by(case.net().to(dtype))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for seed in range(2):
        optimizer.zero_grad()
        out = model(inputs(dtype, seed))
        (out[0] if isinstance(out, tuple) else out).square().mean().backward()
        optimizer.step()
    model.eval()
    plain = case.net().to(dtype).eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters(remove_duplicate=False):
            path, _, local = name.rpartition(".")
            parameter.copy_(getattr(model.get_submodule(path), local))
        for name, buffer in plain.named_buffers():
            buffer.copy_(model.get_buffer(name))
    return plain, model


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        out = model(x)
    return list(out) if isinstance(out, tuple) else [out]


def close(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        eps = torch.finfo(b.dtype).eps
        torch.testing.assert_close(a, b, rtol=100 * eps, atol=100 * eps)


@pytest.mark.parametrize("case", TABLE)
def test_the_folded_graph_is_that_of_the_plain_model(case: Case) -> None:
    plain, model = made(case)
    found = fxp.diff(plain, fxp.fold(model, arithmetic=False))
    assert not found, str(found)
    found = fxp.diff(fxp.fold(plain), fxp.fold(model))
    assert not found, str(found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", TABLE)
def test_folding_keeps_the_outputs(case: Case, dtype: torch.dtype) -> None:
    plain, model = made(case, dtype)
    wanted = run(model, inputs(dtype))
    close(run(plain, inputs(dtype)), wanted)
    for folded in (fxp.fold(model), fxp.fold(model, arithmetic=False), fxp.restore(model)):
        close(run(folded, inputs(dtype)), wanted)
        assert not folded.training


@pytest.mark.parametrize("net", [Normed, Bare, SharedModule], ids=lambda n: n.__name__)
def test_every_module_of_a_folded_model_is_in_eval_mode(net: type[nn.Module]) -> None:
    assert not any(module.training for module in fxp.fold(by_spec(net())).modules())


@pytest.mark.parametrize("case", TABLE)
def test_weights_are_parameters_without_gradient_and_no_latent_is_left(case: Case) -> None:
    plain, model = made(case)
    folded = fxp.fold(model, arithmetic=False)
    names = dict(plain.named_parameters(remove_duplicate=False))
    found = dict(folded.named_parameters(remove_duplicate=False))
    assert found.keys() <= names.keys()
    # Tied tensors may be read under one of their names; every other is there.
    assert {id(names[name]) for name in found} == set(map(id, names.values()))
    for name, parameter in found.items():
        assert isinstance(parameter, nn.Parameter) and not parameter.requires_grad, name
        torch.testing.assert_close(parameter, names[name].detach(), rtol=1e-13, atol=1e-13)
    assert not any("parametrizations" in name or name.endswith(("_orig", "_g", "_v")) for name in folded.state_dict())
    # Nothing of it is the model's.
    theirs = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *model.weights().values())}
    assert theirs.isdisjoint(t.untyped_storage().data_ptr() for t in (*folded.parameters(), *folded.buffers()))


@pytest.mark.parametrize("case", TABLE)
def test_restore_gives_back_the_users_model(case: Case) -> None:
    plain, model = made(case)
    model.train()
    model.requires_grad_(True)
    restored = fxp.restore(model)
    assert type(restored) is case.net
    assert restored.training
    assert [(n, type(m)) for n, m in restored.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    # The order of a weight that was parametrized before is another test's.
    order = list if case.by is by_spec else sorted
    assert order(restored.state_dict()) == order(plain.state_dict())
    names = order(n for n, _ in plain.named_parameters(remove_duplicate=False))
    assert order(n for n, _ in restored.named_parameters(remove_duplicate=False)) == names
    assert order(n for n, _ in restored.named_parameters()) == order(n for n, _ in plain.named_parameters())
    for name, parameter in restored.named_parameters():
        assert type(parameter) is nn.Parameter and parameter.requires_grad and parameter.is_leaf, name
        torch.testing.assert_close(parameter, plain.get_parameter(name), rtol=1e-13, atol=1e-13)
    theirs = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *model.weights().values())}
    assert theirs.isdisjoint(t.untyped_storage().data_ptr() for t in (*restored.parameters(), *restored.buffers()))
    for module in restored.modules():
        assert not module._forward_pre_hooks and not module._state_dict_hooks
    # It trains as the plain model would.
    before = [p.detach().clone() for p in restored.parameters()]
    out = restored(inputs())
    (out[0] if isinstance(out, tuple) else out).square().sum().backward()
    torch.optim.SGD(restored.parameters(), 0.1).step()
    assert not all(map(torch.equal, before, restored.parameters()))
    copy.deepcopy(restored)


@pytest.mark.parametrize("case", TABLE)
def test_the_exported_graph_is_that_of_the_plain_model(case: Case) -> None:
    plain, model = made(case)
    restored = fxp.restore(model).eval()

    def listing(module: nn.Module) -> list[str]:
        program = torch.export.export(module, (inputs(),))
        nodes = [f"{n.op} {n.name} {n.target} {n.args}" for n in program.graph.nodes]
        names = [str(spec.target) for spec in program.graph_signature.input_specs]
        return nodes + names if case.by is by_spec else [line for line in nodes if "placeholder" not in line] + sorted(names)

    with pytest.warns() if case.net is Lstm else _quiet():
        assert listing(restored) == listing(plain)


def _quiet() -> Any:
    from contextlib import nullcontext

    return nullcontext()


@pytest.mark.parametrize("net", [Mlp, Conv, Lstm, Attention], ids=lambda n: n.__name__)
def test_an_adopted_weight_gets_its_old_place(net: type[nn.Module]) -> None:
    """The order of parameters is that of optimizer states and of exported signatures."""
    assert list(fxp.restore(by_parametrize(net())).state_dict()) == list(net().state_dict())


def test_a_submodule_named_like_something_of_ours_is_found() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(N, N))
            self.graph = nn.Linear(N, N)

        def forward(self, x: Tensor) -> Tensor:
            return self.graph(self.body(x))

    model = fxp.transform(Net(), {"body.0.weight": Doubled()})
    assert type(model.get_submodule("graph")) is nn.Linear
    assert model.get_parameter("body.0.bias").shape == (N,)
    assert set(fxp.restore(model).state_dict()) == set(Net().state_dict())
    assert model.report.body == "live"
    with pytest.raises(fxp.TraceError, match="Net.graph has a name that a graph module needs for itself"):
        fxp.fold(model)


@pytest.mark.parametrize("case", [c for c in CASES if c.by is by_spec], ids=str)
def test_fold_of_a_plain_module(case: Case) -> None:
    torch.manual_seed(0)
    plain = case.net().double().eval()
    before = copy.deepcopy(plain.state_dict())
    x = inputs()
    folded = fxp.fold(plain)
    close(run(folded, x), run(plain, x))
    assert all(p.requires_grad for p in plain.parameters())
    assert all(map(torch.equal, before.values(), plain.state_dict().values()))
    assert not any(p.requires_grad for p in folded.parameters())
    found = fxp.diff(plain, fxp.fold(plain, arithmetic=False))
    assert not found, str(found)


@pytest.mark.parametrize("net", [Normed, StandardizedNet], ids=lambda n: n.__name__)
def test_arithmetic_is_folded_or_left_alone(net: type[nn.Module]) -> None:
    plain = net().double().eval()
    folded, left = fxp.fold(plain), fxp.fold(plain, arithmetic=False)
    assert any(name.startswith("hoisted.") for name, _ in folded.named_parameters())
    assert not any(name.startswith("hoisted.") for name, _ in left.named_parameters())
    inputs_of = {n for n in folded.graph.nodes if n.op == "placeholder"}
    seen = set(inputs_of)
    for node in folded.graph.nodes:
        if node.all_input_nodes and seen & set(node.all_input_nodes):
            seen.add(node)
        elif node.op == "call_function":
            assert node.target is __import__("operator").getitem, f"{node} depends on parameters only"


def test_compute_dtype_rounds_once() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32))
    model = fxp.transform(net, {"0.weight": fxp.orthogonal(map="matrix_exp")})
    latent = model.latents()["0.parametrizations.weight.original"].detach()
    latent.add_(torch.randn(32, 32))
    wide = copy.deepcopy(model).double()
    exact = wide.weights()["0.weight"].detach()
    once = fxp.fold(model, compute_dtype=torch.float64).get_parameter("0.weight")
    assert once.dtype == torch.float32
    assert torch.equal(once, exact.float())
    assert not torch.equal(fxp.fold(model).get_parameter("0.weight"), exact.float()), "too easy: single precision is exact too"
    assert torch.equal(fxp.restore(model, compute_dtype=torch.float64).get_parameter("0.weight"), exact.float())
    assert torch.equal(latent, model.latents()["0.parametrizations.weight.original"])


def test_compute_dtype_reaches_the_models_own_arithmetic_and_what_it_reads() -> None:
    """Weight arithmetic on a computed weight: rounded once, at the end of both."""
    torch.manual_seed(0)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(32, 32, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, torch.matrix_exp(self.a.weight / 3) @ self.a.weight)

    plain = Both()
    exact = copy.deepcopy(plain).double()
    w = exact.a.weight.detach()
    folded = fxp.fold(plain, compute_dtype=torch.float64)
    (value,) = folded.parameters()
    assert value.dtype == torch.float32
    assert torch.equal(value, (torch.matrix_exp(w / 3) @ w).float())


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(N, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).relu() if x.shape[0] > 2 else self.a(x)


def test_without_inputs_the_error_says_what_to_pass() -> None:
    model = fxp.transform(Branching(), {"a.weight": Doubled()})
    with pytest.raises(
        fxp.TraceError, match=r"cannot be traced without inputs: .*fxp\.fold\(model, example_inputs=\(x, \.\.\.\)\)"
    ):
        fxp.fold(model)
    folded = fxp.fold(model, example_inputs=(torch.randn(4, N),))
    x = torch.randn(4, N)
    torch.testing.assert_close(folded(x), model(x))
    given = fxp.transform(Branching(), {"a.weight": Doubled()}, example_inputs=(torch.randn(4, N),))
    torch.testing.assert_close(fxp.fold(given)(x), given(x))


@pytest.mark.parametrize("case", [c for c in CASES if c.by in (by_spec, by_legacy_weight_norm)], ids=str)
def test_the_export_layer_folds_to_the_same_numbers(case: Case) -> None:
    """The graph comes from ``torch.export`` where symbolic tracing is not exact."""
    from fxparam.api.fold import _exported, plain_model

    plain, model = made(case)
    for arithmetic in (True, False):
        folded = _exported(plain_model(model), (inputs(),), None, arithmetic)
        close(run(folded, inputs()), run(plain, inputs()))
        close(run(folded, inputs(seed=8)), run(plain, inputs(seed=8)))
        assert not any(p.requires_grad for p in folded.parameters())


def test_frozen_parameters_stay_frozen_in_restore() -> None:
    net = Mlp()
    net.a.weight.requires_grad_(False)
    net.a.bias.requires_grad_(False)
    restored = fxp.restore(fxp.transform(net, {"a.weight": Doubled()}))
    assert {n for n, p in restored.named_parameters() if p.requires_grad} == {"b.weight"}


def test_restore_keeps_hooks_attributes_and_modes() -> None:
    net = Mlp()
    net.note = {"a": [1]}
    net.a.register_forward_hook(lambda module, args, out: out * 3)
    net.a.eval()
    expected = copy.deepcopy(net)
    restored = fxp.restore(fxp.transform(net, {"a.weight": Doubled()}))
    assert restored.note == {"a": [1]} and restored.note is not net.note
    assert (restored.training, restored.a.training, restored.b.training) == (True, False, True)
    x = torch.randn(2, N)
    torch.testing.assert_close(restored(x), expected(x))


def test_restore_of_restore_can_be_transformed_again() -> None:
    model = fxp.transform(Mlp(), {"*.weight": fxp.weight_norm()})
    again = fxp.transform(fxp.restore(model), {"*.weight": fxp.weight_norm()})
    x = torch.randn(2, N)
    torch.testing.assert_close(again(x), model(x))
    assert list(again.state_dict()) == list(model.state_dict())


def test_fold_of_buffers_a_forward_writes_keeps_them() -> None:
    """In eval mode still written: the folded graph writes as the model does."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(N, N)
            self.register_buffer("n", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.n.add_(1)
            return self.a(x) * self.n * (self.n + 1)

    net = Counting()
    folded = fxp.fold(net)
    x = torch.randn(2, N)
    for _ in range(3):
        torch.testing.assert_close(folded(x), net(x))


def test_refolding_after_training_gives_the_new_weights() -> None:
    model = fxp.transform(Mlp(), {"*.weight": Doubled()})
    x = torch.randn(2, N)
    first = fxp.fold(model)(x)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    model(x).square().sum().backward()
    optimizer.step()
    second = fxp.fold(model)
    assert not torch.allclose(first, second(x))
    torch.testing.assert_close(second(x), model(x))


# --- ONNX


def nodes(path: Path) -> tuple[list[Any], list[str]]:
    import onnx

    graph = onnx.load(path).graph
    return [(n.op_type, n.name, list(n.input), list(n.output)) for n in graph.node], sorted(i.name for i in graph.initializer)


@pytest.mark.parametrize(
    "case", [Case(Mlp, by_spec), Case(Conv, by_legacy_weight_norm), Case(Tied, by_spec), Case(Mlp, by_prune)], ids=str
)
@pytest.mark.filterwarnings("ignore")
def test_the_onnx_file_is_that_of_the_plain_model(case: Case, tmp_path: Path) -> None:
    plain, model = made(case, torch.float32)
    x = inputs(torch.float32)
    fxp.export_onnx(plain, (x,), tmp_path / "plain.onnx")
    fxp.export_onnx(model, (x,), tmp_path / "model.onnx")
    assert nodes(tmp_path / "model.onnx") == nodes(tmp_path / "plain.onnx")
    assert not any("parametrizations" in name for name in nodes(tmp_path / "model.onnx")[1])


@pytest.mark.parametrize("case", [Case(Mlp, by_spec), Case(Normed, by_spec), Case(StandardizedNet, by_spec)], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_refit_after_training(case: Case, tmp_path: Path) -> None:
    import onnxruntime

    _, model = made(case, torch.float32)
    x = inputs(torch.float32)
    path = tmp_path / "model.onnx"
    fxp.export_onnx(model, (x,), path)
    before = nodes(path)
    model.train()
    model(x).square().sum().backward()
    torch.optim.SGD(model.parameters(), 0.3).step()
    model.eval()
    fxp.refit_onnx(path, model, (x,))
    assert nodes(path) == before
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), run(model, x)[0], rtol=1e-4, atol=1e-5)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(N, N)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.lin(x)
        return y if mask is None else y * mask


class Centred(Masked):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            centre = x.mean()
        return self.lin(x) * centre


class Rolled(Masked):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for row in x:
            x = self.lin(x) * row.sum() * random.random()
        return x


def test_optional_inputs_that_are_given_count() -> None:
    model = fxp.transform(Masked().double(), {"lin.weight": Doubled()})
    x, mask = torch.randn(2, N).double(), torch.rand(2, N).double()
    torch.testing.assert_close(fxp.fold(model, example_inputs=(x, mask))(x, mask), model(x, mask))
    torch.testing.assert_close(fxp.fold(model, example_inputs=(x,))(x), model(x))


@pytest.mark.parametrize("arithmetic", [True, False])
def test_regions_of_an_exported_graph_are_kept(arithmetic: bool, tmp_path: Path) -> None:
    model = fxp.transform(Centred(), {"lin.weight": Doubled()})
    x = torch.randn(2, N)
    folded = fxp.fold(model, example_inputs=(x,), arithmetic=arithmetic)
    torch.testing.assert_close(folded(x), model(x))
    assert fxp.export_onnx(model, (x,), tmp_path / "m.onnx").initializers == ("lin.weight", "lin.bias")


def test_an_export_that_would_bake_random_numbers_is_refused() -> None:
    model = fxp.transform(Rolled(), {"lin.weight": Doubled()})
    with pytest.raises(fxp.TraceError, match="draws random numbers that are not PyTorch's"):
        fxp.fold(model, example_inputs=(torch.randn(2, N),))
