"""Compilers: ``model.compile()`` keeps the cache, ``torch.compile(model)`` and ``torch.export`` put the prologue inline.

The oracle is the same net under ``torch.nn.utils.parametrize``, run eagerly with an optimizer of its own.
"""

from __future__ import annotations

import contextlib
import copy
import io
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import fxparam as fxp

# What dynamo looks at on its way; it hides the warning unless warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")

N = 5
DTYPE = torch.float64


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


X = noise(1, 4, N)


class SkewExp(nn.Module):
    def forward(self, latent: Tensor) -> Tensor:
        lower = latent.tril(-1)
        return torch.matrix_exp(lower - lower.mT)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(N, N, dtype=DTYPE) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.c(torch.tanh(self.b(torch.tanh(self.a(x))))))


class Methods(nn.Module):
    """Weights read outside of their layers and by methods, some twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = (nn.Linear(N, N, dtype=DTYPE) for _ in range(2))

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(self.encoder(x))

    def penalty(self) -> Tensor:
        return self.encoder.weight.exp().mean()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.encode(x), self.encoder.weight.mT + self.decoder.weight) * self.penalty()


class Standardized(nn.Module):
    """Weight arithmetic of the forward's own: hoisted, so that the body is a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = (nn.Parameter(torch.randn(N, N, dtype=DTYPE)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ (self.w / self.w.norm(dim=1, keepdim=True))) @ self.w @ torch.softmax(self.v, 1)


class Branching(Layers):
    """Python that no tracer takes: the body stays live."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b) if x.shape[0] > 2 else (self.c,):
            x = torch.tanh(layer(x))
        return x


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(N, N, dtype=DTYPE)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x.unsqueeze(1))[0].squeeze(1)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(N, N, dtype=DTYPE) for _ in range(2))
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def both(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    shared = a.exp()
    return shared * b, shared + 1.0


def eager_twin(net: nn.Module, spec: dict[Any, Any]) -> tuple[Any, fxp.ParametrizedModule]:
    """For what ``parametrize`` cannot say: the same model, not compiled."""
    model = fxp.transform(net, spec)
    return copy.deepcopy(model), model


def adopted(net: nn.Module) -> tuple[Any, fxp.ParametrizedModule]:
    return net, fxp.transform(copy.deepcopy(net))


def skew() -> tuple[Any, fxp.ParametrizedModule]:
    net = Layers()
    for layer in (net.a, net.b):
        parametrize.register_parametrization(layer, "weight", SkewExp())
    return adopted(net)


def orthogonals() -> tuple[Any, fxp.ParametrizedModule]:
    net = Layers()
    for layer, name in zip((net.a, net.b, net.c), ("cayley", "matrix_exp", "householder"), strict=True):
        orthogonal(layer, orthogonal_map=name)
    return adopted(net)


def norms() -> tuple[Any, fxp.ParametrizedModule]:
    net = Layers()
    weight_norm(net.a)
    spectral_norm(net.b)
    return adopted(net)


def methods() -> tuple[Any, fxp.ParametrizedModule]:
    net = Methods()
    parametrize.register_parametrization(net.encoder, "weight", SkewExp())
    return adopted(net)


def hoisted() -> tuple[Any, fxp.ParametrizedModule]:
    return adopted(Standardized())


def branching() -> tuple[Any, fxp.ParametrizedModule]:
    net = Branching()
    parametrize.register_parametrization(net.a, "weight", SkewExp())
    return adopted(net)


def recurrent() -> tuple[Any, fxp.ParametrizedModule]:
    net = Recurrent()
    parametrize.register_parametrization(net.rnn, "weight_ih_l0", nn.Softplus(), unsafe=True)
    return adopted(net)


def tied() -> tuple[Any, fxp.ParametrizedModule]:
    return eager_twin(Tied(), {"a.weight": fxp.custom(SkewExp(), init=lambda w: w)})


def joint_and_ref() -> tuple[Any, fxp.ParametrizedModule]:
    spec = {
        fxp.joint("a.weight", "b.weight"): fxp.custom(both, init=lambda weights: tuple(weights)),
        "c.weight": fxp.ref("a.weight") >> fxp.transpose(),
    }
    return eager_twin(Layers(), spec)


def subspace() -> tuple[Any, fxp.ParametrizedModule]:
    return eager_twin(Layers(), {fxp.joint("*"): fxp.subspace(dim=20)})


MODELS: list[Callable[[], tuple[Any, fxp.ParametrizedModule]]] = [
    skew,
    orthogonals,
    norms,
    methods,
    hoisted,
    branching,
    recurrent,
    tied,
    joint_and_ref,
    subspace,
]


def check(got: Any, want: Any, tol: float = 1e-11) -> None:
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def grads(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def train(oracle: Any, model: Any, run: Callable[[Tensor], Tensor], *, steps: int = 3, x: Tensor = X) -> None:
    """Optimizer steps of both, with outputs and gradients compared at each."""
    optimizers = [torch.optim.SGD(module.parameters(), 0.05) for module in (oracle, model)]
    for _ in range(steps):
        outputs = []
        for optimizer, call in zip(optimizers, (oracle, run), strict=True):
            optimizer.zero_grad()
            output = call(x)
            output.square().mean().backward()
            outputs.append(output.detach())
        check(outputs[1], outputs[0])
        check(grads(model), grads(oracle))
        for optimizer in optimizers:
            optimizer.step()
    check(dict(model.named_buffers()), dict(oracle.named_buffers()))


# --- model.compile()


@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_compile_keeps_the_cache(make: Callable[[], tuple[Any, fxp.ParametrizedModule]]) -> None:
    oracle, model = make()
    counter = CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter)
    train(oracle, model, model)
    compiled = counter.frame_count
    train(oracle, model, model)
    assert counter.frame_count == compiled > 0, "no step compiles again"
    assert model.stats.refreshes == 6 and model.stats.inlined == 0


def test_compile_compiles_once_for_each_mode() -> None:
    oracle, model = skew()
    counter = CompileCounter()
    model.compile(backend=counter)
    for mode in (True, False, True, False):
        oracle.train(mode)
        model.train(mode)
        train(oracle, model, model, steps=2)
    assert counter.frame_count == 2
    with torch.no_grad():
        check(model(X), oracle(X))
        check(model(X), oracle(X))
    assert counter.frame_count == 3


def test_compile_leaves_the_prologue_out_of_the_graph() -> None:
    _, model = skew()
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    model.compile(backend=backend, fullgraph=True)
    model(X)
    assert seen and not any("matrix_exp" in target for target in seen)


def test_compile_with_micro_batches_and_several_backwards() -> None:
    oracle, model = skew()
    model.compile(backend="aot_eager")
    for net in (oracle, model):
        (net(X).sum() + net(2 * X).sum()).backward()
        net(3 * X).sum().backward()
    check(grads(model), grads(oracle))
    assert (model.stats.refreshes, model.stats.hits) == (1, 2)


def test_compile_first_without_gradient() -> None:
    oracle, model = skew()
    model.compile(backend="aot_eager")
    with torch.no_grad():
        check(model(X), oracle(X))
    train(oracle, model, model)
    with torch.inference_mode():
        check(model(X), oracle(X))
    train(oracle, model, model)


def test_compile_runs_hooks() -> None:
    _, model = skew()
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("root"))
    model.get_submodule("a").register_forward_hook(lambda *_: calls.append("layer"))
    model.compile(backend="eager")
    for _ in range(2):
        model(X)
    assert calls == ["layer", "root"] * 2


def test_compile_after_an_error() -> None:
    oracle, model = skew()
    model.compile(backend="eager")
    with pytest.raises(RuntimeError):
        model(noise(0, 3, N + 1))
    train(oracle, model, model)


def test_compile_with_a_frozen_latent() -> None:
    oracle, model = skew()
    model.compile(backend="aot_eager")
    train(oracle, model, model, steps=1)
    for name in model.freeze("a.*"):
        oracle.get_parameter(name).requires_grad_(False)
        oracle.get_parameter(name).grad = model.get_parameter(name).grad = None
    train(oracle, model, model, steps=2)
    model.unfreeze("a.*")
    for parameter in oracle.parameters():
        parameter.requires_grad_(True)
    train(oracle, model, model, steps=2)


# --- torch.compile(model)


@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_torch_compile_is_one_graph_with_the_right_values(make: Callable[[], tuple[Any, fxp.ParametrizedModule]]) -> None:
    oracle, model = make()
    counter = CompileCounterWithBackend("aot_eager")
    # LSTM refuses fullgraph in plain PyTorch as well.
    run = torch.compile(model, backend=counter, fullgraph=make is not recurrent)
    train(oracle, model, run)
    compiled = counter.frame_count
    train(oracle, model, run)
    assert counter.frame_count == compiled > 0, "no step compiles again"
    if make is not recurrent:
        assert compiled == 1
        assert model.stats.refreshes == 0


@pytest.mark.parametrize("options", [{}, {"fullgraph": True}, {"dynamic": True}], ids=str)
def test_torch_compile_modes_and_sizes(options: dict[str, Any]) -> None:
    oracle, model = skew()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=counter, **options)
    for mode in (True, False, True):
        oracle.train(mode)
        model.train(mode)
        train(oracle, model, run, steps=2)
    for size in (2, 3, 6, 7):
        train(oracle, model, run, steps=1, x=noise(size, size, N))
    assert counter.frame_count <= (1 if options.get("dynamic") else 2)
    with torch.no_grad():
        check(run(X), oracle(X))
    train(oracle, model, model)


def test_torch_compile_sees_every_write() -> None:
    oracle, model = skew()
    run = torch.compile(model, backend="aot_eager")
    name = "a.parametrizations.weight.original"
    writes: list[Callable[[Any], Any]] = [
        lambda net: net.get_parameter(name).detach().mul_(1.5),
        lambda net: net.get_parameter(name).data.add_(0.5),
        lambda net: net.load_state_dict({key: 0.5 * value for key, value in net.state_dict().items()}),
    ]
    for write in writes:
        check(run(X), oracle(X))
        write(oracle)
        write(model)
    check(run(X), oracle(X))


def test_torch_compile_of_methods_and_of_functions_around() -> None:
    oracle, model = methods()

    def loss(net: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: net(x).mean() + net.penalty() + net.encoder.weight.mean()

    run = torch.compile(loss(model), backend="aot_eager", fullgraph=True)
    for net, call in ((oracle, loss(oracle)), (model, run)):
        net.zero_grad()
        call(X).backward()
    check(grads(model), grads(oracle))
    for name in ("encode", "penalty"):
        args = (X,) if name == "encode" else ()
        check(torch.compile(getattr(model, name), backend="aot_eager")(*args), getattr(oracle, name)(*args))


@pytest.mark.parametrize("own", [False, True])
def test_torch_compile_of_a_model_around(own: bool) -> None:
    oracle, model = skew()
    torch.manual_seed(2)
    head = nn.Linear(N, N, dtype=DTYPE)
    whole: Any = nn.Sequential(model, head)
    if own:
        model.compile(backend="aot_eager")
    run = whole if own else torch.compile(whole, backend="aot_eager", fullgraph=True)
    train(nn.Sequential(oracle, copy.deepcopy(head)), whole, run)
    assert model.stats.refreshes == (3 if own else 0)


def test_spectral_norm_advances_at_each_compiled_forward() -> None:
    oracle, model = norms()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        check(run(X), oracle(X))
        check(dict(model.named_buffers()), dict(oracle.named_buffers()))
    for net in (oracle, model):
        net.eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    check(run(X), oracle(X))
    check(dict(model.named_buffers()), before)


# --- both


def compiled(model: fxp.ParametrizedModule, how: str, backend: Any = "aot_eager") -> Any:
    if how == "torch.compile":
        return torch.compile(model, backend=backend)
    model.compile(backend=backend)
    return model


HOW = pytest.mark.parametrize("how", ["model.compile", "torch.compile"])


@HOW
def test_autocast(how: str) -> None:
    oracle, model = skew()
    oracle.float()
    model.float()
    run = compiled(model, how)
    x = X.float()
    for enabled in (True, False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            got, want = run(x), oracle(x)
        assert got.dtype == want.dtype
        check(got, want, 2**-7 if enabled else 1e-5)


@HOW
def test_moved_to_another_dtype(how: str) -> None:
    oracle, model = skew()
    run = compiled(model, how)
    check(run(X), oracle(X))
    oracle.float()
    model.float()
    check(run(X.float()), oracle(X.float()), 1e-5)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = (nn.Linear(N, N, dtype=DTYPE) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.layer(self.layer(x)))


def random_maps(net: Any) -> tuple[Any, fxp.ParametrizedModule]:
    parametrize.register_parametrization(net.layer if isinstance(net, Twice) else net.a, "weight", nn.Dropout(0.5))
    parametrize.register_parametrization(net.other if isinstance(net, Twice) else net.b, "weight", SkewExp())
    return adopted(net)


def compare_random(oracle: Any, run: Any) -> None:
    outputs = []
    for call in (oracle, run):
        torch.manual_seed(4)
        outputs.append([call(X) for _ in range(3)])
    check(outputs[1], outputs[0])
    assert not torch.equal(outputs[0][0], outputs[0][1])


@HOW
def test_a_random_map_is_drawn_anew_at_each_forward(how: str) -> None:
    oracle, model = random_maps(Layers())
    run = compiled(model, how, "eager")
    compare_random(oracle, run)
    for net in (oracle, model):
        net.eval()
    check(run(X), oracle(X))


@HOW
def test_a_random_map_is_drawn_anew_at_each_read(how: str) -> None:
    oracle, model = random_maps(Twice())
    compare_random(oracle, compiled(model, how, "eager"))


@HOW
def test_copies_can_be_compiled(how: str) -> None:
    oracle, model = skew()
    run = compiled(model, how)
    train(oracle, model, run, steps=1)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        twin = copy.deepcopy(oracle)
        # A copy starts uncompiled, as a copied nn.Module does.
        assert copied._fxp_compiled is None
        train(twin, copied, copied, steps=1)
        train(twin, copied, compiled(copied, how))
        assert copied.stats.refreshes == (1 if how == "torch.compile" else 4)
    train(oracle, model, run, steps=1)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor() -> None:
    oracle, model = skew()
    model.compile()
    train(oracle, model, model, steps=2)


# --- torch.export


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_export_computes_the_weights(make: Callable[[], tuple[Any, fxp.ParametrizedModule]], strict: bool) -> None:
    oracle, model = make()
    for net in (oracle, model):
        net.eval()
    # What a strict export says of the place where weights wait for their readers.
    with pytest.warns(UserWarning, match="_fxp_inline") if strict else contextlib.nullcontext():
        program = torch.export.export(model, (X,), strict=strict)
    check(program.module()(X), oracle(X))
    assert set(program.state_dict) == set(model.state_dict())
    # It computes them from the latents that it is given, and shares them with the model.
    with torch.no_grad():
        for net in (model, oracle):
            for _, parameter in sorted(net.named_parameters()):
                parameter.mul_(0.5)
    check(program.module()(X), oracle(X))
    # The model goes on as before.
    for net in (oracle, model):
        net.train()
    train(oracle, model, model)
    assert model.stats.inlined == 0


def test_export_in_training_mode_and_after_steps() -> None:
    oracle, model = skew()
    train(oracle, model, model, steps=2)
    program = torch.export.export(model, (X,), strict=False)
    got: Any = program.module()
    check(got(X), oracle(X))
    train(oracle, model, model, steps=2)


def test_export_with_a_dynamic_size() -> None:
    oracle, model = skew()
    size = torch.export.Dim("size", min=2, max=64)
    # forward(*args): the inputs are one tuple.
    program = torch.export.export(model, (X,), dynamic_shapes=(({0: size},),), strict=False)
    x = noise(7, 9, N)
    check(program.module()(x), oracle(x))


def test_export_with_a_dynamic_size_by_the_users_name() -> None:
    # The wrapper takes any arguments; their names are those of the user's class, which restore gives back.
    oracle, model = skew()
    size = torch.export.Dim("size", min=2, max=64)
    program = torch.export.export(fxp.restore(model), (X,), dynamic_shapes={"x": {0: size}}, strict=False)
    x = noise(7, 9, N)
    check(program.module()(x), oracle(x))


def test_export_of_a_compiled_model() -> None:
    oracle, model = skew()
    model.compile(backend="eager")
    model(X)
    program = torch.export.export(model, (X,), strict=False)
    check(program.module()(X), oracle(X))


@pytest.mark.parametrize("first", range(4))
def test_ways_of_running_can_be_mixed(first: int) -> None:
    ways = ("eager", "model.compile", "export", "torch.compile")
    oracle, model = skew()
    for how in (*ways[first:], *ways[:first]):
        if how == "eager":
            check(model(X), oracle(X))
        elif how == "export":
            check(torch.export.export(model, (X,), strict=False).module()(X), oracle(X))
        else:
            train(oracle, model, compiled(model, how, "eager"), steps=1)
