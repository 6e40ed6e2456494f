"""``defer_backward``: the same gradients as plain accumulation of micro-batches, through one backward of the prologue.

The oracle is the same net under ``torch.nn.utils.parametrize``, which computes its weights at each read; each scenario runs on
both, with and without the block.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

import fxparam as fxp

N = 5
DTYPE = torch.float64
Block = Callable[[], AbstractContextManager[Any]]
Scenario = Callable[[Any, Block], Any]
SCENARIOS: dict[str, Scenario] = {}
A, B = "a.parametrizations.weight.original", "b.parametrizations.weight.original"


class SkewExp(nn.Module):
    def forward(self, latent: Tensor) -> Tensor:
        lower = latent.tril(-1)
        return torch.matrix_exp(lower - lower.mT)


class Net(nn.Module):
    """Three layers, of which a call uses those in ``path``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(N, N, dtype=DTYPE) for _ in range(3))

    def forward(self, x: Tensor, path: str = "abc") -> Tensor:
        for name in path:
            x = torch.tanh(getattr(self, name)(x))
        return x


def plain() -> Net:
    net = Net()
    for layer in (net.a, net.b):
        parametrize.register_parametrization(layer, "weight", SkewExp())
    return net


def pair() -> tuple[Any, fxp.ParametrizedModule]:
    """The oracle and the transformed model, with the same latents under the same names."""
    oracle = plain()
    return oracle, fxp.transform(copy.deepcopy(oracle))


def batches(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, N, generator=generator, dtype=DTYPE) for size in sizes]


X = batches(3, 1, 4, 2)


def grads(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def check(got: Any, want: Any, tol: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def accumulate(model: Any, xs: list[Tensor] = X) -> None:
    for x in xs:
        model(x).square().mean().backward()


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


# --- losses


@scenario
def different_sizes(model: Any, block: Block) -> Any:
    with block():
        accumulate(model)


@scenario
def nothing_happens(model: Any, block: Block) -> Any:
    with block():
        pass


@scenario
def forwards_only(model: Any, block: Block) -> Any:
    with block():
        return model(X[0]).detach()


@scenario
def losses_reach_some_weights(model: Any, block: Block) -> Any:
    with block():
        for x, path in zip(X, ("abc", "a", "b", "c"), strict=True):
            model(x, path).sum().backward()


@scenario
def losses_reach_no_weight(model: Any, block: Block) -> Any:
    with block():
        for x in X:
            model(x, "c").sum().backward()


@scenario
def one_loss_of_all(model: Any, block: Block) -> Any:
    with block():
        torch.stack([model(x).sum() for x in X]).sum().backward()


@scenario
def losses_of_the_weights_themselves(model: Any, block: Block) -> Any:
    with block():
        for x in X:
            (model(x).sum() + model.a.weight.square().sum()).backward()
        model.b.weight.exp().sum().backward()


@scenario
def losses_of_the_latents_as_well(model: Any, block: Block) -> Any:
    latent = model.get_parameter(A)
    with block():
        for x in X:
            (model(x).sum() + latent.square().sum()).backward()


@scenario
def backward_after_the_block(model: Any, block: Block) -> Any:
    with block():
        losses = [model(x).sum() for x in X]
    for loss in losses:
        loss.backward()


@scenario
def one_backward_after_the_block(model: Any, block: Block) -> Any:
    with block():
        losses = [model(x).sum() for x in X]
    torch.stack(losses).sum().backward()


@scenario
def some_before_and_some_after(model: Any, block: Block) -> Any:
    accumulate(model, X[:1])
    with block():
        accumulate(model, X[1:2])
        late = model(X[2]).sum()
    accumulate(model, X[3:])
    late.backward()


@scenario
def forward_before_the_block(model: Any, block: Block) -> Any:
    early = model(X[0]).sum()
    with block():
        accumulate(model, X[1:])
        early.backward()


@scenario
def retained_graphs(model: Any, block: Block) -> Any:
    with block():
        loss = model(X[0]).square().sum()
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()


@scenario
def gradient_penalty(model: Any, block: Block) -> Any:
    with block():
        for x in X:
            x = x.clone().requires_grad_()
            out = model(x).square().sum()
            (slope,) = torch.autograd.grad(out, x, create_graph=True)
            (out + slope.square().sum()).backward()


@scenario
def gradients_of_inputs(model: Any, block: Block) -> Any:
    with block():
        x = X[0].clone().requires_grad_()
        loss = model(x).square().sum()
        found = torch.autograd.grad(loss, x, retain_graph=True)
        loss.backward(inputs=[x])
        return found, x.grad


@scenario
def a_forward_without_gradient(model: Any, block: Block) -> Any:
    with block():
        model(X[0]).sum().backward()
        with torch.no_grad():
            frozen = model(X[1])
        with torch.inference_mode():
            model(X[1])
        model(X[2]).sum().backward()
    return frozen


@scenario
def gradient_off_around_the_block(model: Any, block: Block) -> Any:
    with torch.no_grad(), block(), torch.enable_grad():
        accumulate(model)


@scenario
def inference_mode_around_the_exit(model: Any, block: Block) -> Any:
    with contextlib.ExitStack() as stack:
        stack.enter_context(block())
        accumulate(model)
        stack.enter_context(torch.inference_mode())
        stack.pop_all().__exit__(None, None, None)


@scenario
def autocast_for_some(model: Any, block: Block) -> Any:
    with block():
        for number, x in enumerate(X):
            with torch.autocast("cpu", enabled=number % 2 == 0, dtype=torch.float16):
                model(x).sum().backward()


# --- changes inside the block


@scenario
def eval_in_between(model: Any, block: Block) -> Any:
    with block():
        model(X[0]).sum().backward()
        model.eval()
        with torch.no_grad():
            middle = model(X[1])
        model(X[2]).sum().backward()
        model.train()
        model(X[3]).sum().backward()
    return middle


@scenario
def a_latent_is_written(model: Any, block: Block) -> Any:
    # The map saves no latent, so the sum of the first micro-batch can still pass.
    with block():
        model(X[0]).sum().backward()
        with torch.no_grad():
            model.get_parameter(A).mul_(1.5)
        model(X[1]).sum().backward()


@scenario
def gradients_set_to_zero(model: Any, block: Block) -> Any:
    with block():
        accumulate(model, X[:2])
        model.zero_grad()
        accumulate(model, X[2:])


@scenario
def all_latents_are_frozen(model: Any, block: Block) -> Any:
    for name in (A, B):
        model.get_parameter(name).requires_grad_(False)
    with block():
        accumulate(model)


@scenario
def other_tensors_by_functional_call(model: Any, block: Block) -> Any:
    others = {name: (1.1 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
    with block():
        accumulate(model, X[:1])
        functional_call(model, others, (X[1],)).sum().backward()
    return {name: other.grad for name, other in others.items()}


# --- blocks


@scenario
def nested_blocks(model: Any, block: Block) -> Any:
    with block():
        accumulate(model, X[:1])
        with block():
            accumulate(model, X[1:2])
        inner = grads(model)[A]
        accumulate(model, X[2:])
    return inner is None


@scenario
def one_block_after_the_other(model: Any, block: Block) -> Any:
    for x in X:
        with block():
            accumulate(model, [x, x])


@scenario
def as_a_part_of_another_model(model: Any, block: Block) -> Any:
    torch.manual_seed(1)
    whole = nn.Sequential(nn.Linear(N, N, dtype=DTYPE), model, nn.Tanh())
    with block():
        accumulate(whole)
    return grads(whole)


def _checkpointed(model: Any, block: Block, reentrant: bool) -> None:
    with block():
        for x in X:
            x = x.clone().requires_grad_()
            h = checkpoint(lambda z: torch.tanh(model.a(z)), x, use_reentrant=reentrant)
            h = checkpoint(lambda z: torch.tanh(model.b(model.a(z))), h, use_reentrant=reentrant)
            model.c(h).sum().backward()


@scenario
def checkpointing(model: Any, block: Block) -> Any:
    _checkpointed(model, block, False)


@scenario
def reentrant_checkpointing(model: Any, block: Block) -> Any:
    _checkpointed(model, block, True)


@scenario
def a_checkpoint_around_the_model(model: Any, block: Block) -> Any:
    with block():
        for x in X:
            checkpoint(model, x.clone().requires_grad_(), use_reentrant=True).sum().backward()


@scenario
def clipping_and_two_groups(model: Any, block: Block) -> Any:
    latents = [p for name, p in model.named_parameters() if "parametrizations" in name]
    others = [p for name, p in model.named_parameters() if "parametrizations" not in name]
    optimizer = torch.optim.Adam([{"params": latents, "lr": 0.1}, {"params": others, "lr": 0.01}])
    norms = []
    for _ in range(4):
        optimizer.zero_grad()
        with block():
            accumulate(model)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.05))
        optimizer.step()
    return norms, dict(model.named_parameters())


@scenario
def a_fused_optimizer(model: Any, block: Block) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), 0.05, fused=True)
    for _ in range(4):
        optimizer.zero_grad()
        with block():
            accumulate(model)
        optimizer.step()
    return dict(model.named_parameters())


@scenario
def a_gradient_scaler(model: Any, block: Block) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        optimizer.zero_grad()
        with block():
            for x in X:
                scaler.scale(model(x).square().mean()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
    return dict(model.named_parameters())


@pytest.mark.parametrize("name", SCENARIOS)
def test_equals_plain_accumulation(name: str) -> None:
    oracle, model = pair()
    want = SCENARIOS[name](oracle, contextlib.nullcontext)
    got = SCENARIOS[name](model, model.defer_backward)
    # Half precision stays in a forward under autocast, and its gradients are added in another order.
    tol = 1e-3 if "autocast" in name else 1e-12
    if name == "nested_blocks":
        assert got is False, "the inner block sends its own sum at its own end"
    else:
        check(got, want, tol)
    check(grads(model), grads(oracle), tol)


@pytest.mark.parametrize(
    "name",
    "different_sizes losses_reach_some_weights one_loss_of_all gradient_penalty a_forward_without_gradient checkpointing "
    "reentrant_checkpointing a_checkpoint_around_the_model one_backward_after_the_block".split(),
)
def test_one_evaluation_and_one_backward_of_each_component(name: str) -> None:
    _, model = pair()
    SCENARIOS[name](model, model.defer_backward)
    assert (model.stats.refreshes, model.stats.backwards) == (1, 2)


# --- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_half_precision_are_kept_in_float32(dtype: torch.dtype) -> None:
    # In bfloat16 a running sum of ones stays at 256, in float16 at 2048.
    net = nn.Linear(1, 1, bias=False, dtype=dtype)
    model = fxp.transform(net, {"weight": fxp.custom(lambda latent: latent * 1.0)})
    count = {torch.bfloat16: 300, torch.float16: 2100}[dtype]
    with model.defer_backward():
        for _ in range(count):
            model(torch.ones(1, 1, dtype=dtype)).sum().backward()
    (latent,) = model.latents().values()
    assert latent.grad is not None and latent.grad.dtype == dtype
    assert latent.grad.item() == torch.tensor(float(count), dtype=dtype).item()


# --- other sites


def tied(net: Net) -> dict[Any, Any]:
    return {"a.weight": fxp.custom(SkewExp(), init=lambda w: w), "b.weight": fxp.ref("a.weight") >> fxp.transpose()}


def joint(net: Net) -> dict[Any, Any]:
    def both(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        shared = a.exp()
        return shared * b, shared + 1.0

    return {fxp.joint("a.weight", "b.weight"): fxp.custom(both, init=lambda weights: tuple(weights))}


def normed(net: Net) -> dict[Any, Any]:
    return {"*.weight": fxp.weight_norm()}


@pytest.mark.parametrize("trace", ["auto", "live"])
@pytest.mark.parametrize("spec", [tied, joint, normed], ids=lambda f: f.__name__)
def test_equals_accumulation_without_the_block(spec: Callable[[Net], dict[Any, Any]], trace: Any) -> None:
    net = Net()
    model = fxp.transform(net, spec(net), copy=True, trace=trace)
    oracle = copy.deepcopy(model)
    accumulate(oracle)
    with model.defer_backward():
        accumulate(model)
    check(grads(model), grads(oracle))
    parts = 3 if spec is normed else 1
    assert (model.stats.backwards, oracle.stats.backwards) == (parts, parts * len(X))


class Standardized(nn.Module):
    """Weight arithmetic of the forward's own; ``w`` is also used as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = (nn.Parameter(torch.randn(N, N, dtype=DTYPE)) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(N, dtype=DTYPE))

    def forward(self, x: Tensor) -> Tensor:
        w = self.w - self.w.mean(1, keepdim=True)
        return torch.tanh(x @ (w / w.norm(dim=1, keepdim=True)) + self.bias) @ self.w @ torch.softmax(self.v, 1)


def test_hoisted_arithmetic_is_deferred_too() -> None:
    oracle = Standardized()
    model = fxp.transform(oracle, copy=True)
    accumulate(oracle)
    with model.defer_backward():
        accumulate(model)
    check(grads(model), grads(oracle))
    assert model.stats.backwards == 2
    with pytest.raises(fxp.DeferralError), model.defer_backward():
        accumulate(model)
        torch.optim.SGD(model.parameters(), 0.1).step()


def test_spectral_norm_advances_once() -> None:
    net = nn.Sequential(nn.Linear(N, N, dtype=DTYPE), nn.Tanh())
    spectral_norm(net[0])
    model = fxp.transform(net, copy=True)
    net(X[0])
    with model.defer_backward():
        accumulate(model)
    assert model.stats.refreshes == 1 and model.stats.backwards == 1
    for name, buffer in net.named_buffers():
        check(model.get_buffer(name), buffer)


def test_a_random_map_is_drawn_at_each_read() -> None:
    oracle = plain()
    parametrize.register_parametrization(oracle.c, "weight", nn.Dropout(0.5))
    model = fxp.transform(copy.deepcopy(oracle))
    torch.manual_seed(5)
    accumulate(oracle)
    torch.manual_seed(5)
    with model.defer_backward():
        accumulate(model)
    check(grads(model), grads(oracle))


def test_a_latent_frozen_inside_gets_nothing_and_the_others_do() -> None:
    oracle, model = pair()
    accumulate(oracle)
    with model.defer_backward():
        accumulate(model)
        model.freeze("a.*")
    want = grads(oracle)
    assert want.pop(A) is not None
    check(grads(model), {**want, A: None})


def test_two_models_in_two_blocks() -> None:
    (oracle1, model1), (oracle2, model2) = pair(), pair()
    accumulate(lambda x: oracle2(oracle1(x)))
    with model1.defer_backward(), model2.defer_backward():
        accumulate(lambda x: model2(model1(x)))
    check(grads(model1), grads(oracle1))
    check(grads(model2), grads(oracle2))
    assert model1.stats.backwards == model2.stats.backwards == 2


def test_a_copy_made_inside_is_not_deferred() -> None:
    _, model = pair()
    with model.defer_backward():
        accumulate(model)
        twin = copy.deepcopy(model)
        accumulate(twin)
        assert grads(twin)[A] is not None and grads(model)[A] is None
    check(grads(model)[A], grads(twin)[A])


# What dynamo looks at on its way; it hides the warning unless warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("how", ["model.compile", "torch.compile"])
def test_compiled(how: str) -> None:
    oracle, model = pair()
    run: Any = model
    if how == "model.compile":
        model.compile(backend="eager")
    else:
        run = torch.compile(model, backend="eager")
    for _ in range(2):
        accumulate(oracle)
        with model.defer_backward():
            accumulate(run)
        check(grads(model), grads(oracle))
    # torch.compile computes the weights in its graph, and has nothing to defer.
    assert model.stats.backwards == (4 if how == "model.compile" else 0)


# --- threads, hooks, memory


def test_threads_have_blocks_of_their_own() -> None:
    oracle, model = pair()
    accumulate(oracle)
    entered, errors = threading.Barrier(2), []

    def work(xs: list[Tensor]) -> None:
        try:
            with model.defer_backward():
                entered.wait(10)
                accumulate(model, xs)
                entered.wait(10)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(xs,)) for xs in (X[:2], X[2:])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    check(grads(model), grads(oracle))
    assert model.stats.backwards == 4


def test_a_thread_without_a_block_is_not_deferred() -> None:
    _, model = pair()
    with model.defer_backward():
        thread = threading.Thread(target=accumulate, args=(model,))
        thread.start()
        thread.join()
        assert grads(model)[A] is not None


def test_hooks_on_latents_fire_once() -> None:
    _, model = pair()
    calls: list[str] = []
    for name in (A, B):
        latent = model.get_parameter(name)
        latent.register_hook(lambda gradient, name=name: calls.append(f"hook {name}"))
        latent.register_post_accumulate_grad_hook(lambda latent, name=name: calls.append(f"post {name}"))
    with model.defer_backward():
        accumulate(model)
        assert calls == []
    assert sorted(calls) == sorted(f"{kind} {name}" for kind in ("hook", "post") for name in (A, B))


def test_kept_losses_keep_no_weights() -> None:
    _, model = pair()
    with model.defer_backward():
        loss = model(X[0]).sum()
        held = weakref.ref(model._fxp_runtime._entries[model._fxp_runtime._modes()].published.values[0])
        loss.backward()
    model.invalidate()
    gc.collect()
    assert loss.grad_fn is not None and held() is None


def test_blocks_leave_no_garbage() -> None:
    _, model = pair()
    with model.defer_backward():
        accumulate(model)
        block = weakref.ref(model._fxp_runtime._local.blocks[-1])
    gc.disable()
    try:
        assert block() is None
    finally:
        gc.enable()


# --- errors


@pytest.fixture
def model() -> Iterator[fxp.ParametrizedModule]:
    yield pair()[1]


def test_step_inside_is_refused(model: fxp.ParametrizedModule) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = model.get_parameter(A).detach().clone()
    text = "optimizer.step() while gradients are deferred: leave the block of model.defer_backward() first"
    with pytest.raises(fxp.DeferralError, match=re.escape(text)), model.defer_backward():
        accumulate(model)
        optimizer.step()
    check(model.get_parameter(A).detach(), before)
    # The error ended the block: the next step is an ordinary one.
    optimizer.zero_grad()
    with model.defer_backward():
        accumulate(model)
    optimizer.step()


@pytest.mark.parametrize("inside", ["no backward", "other parameters", "inner block"])
def test_steps_that_lose_nothing_are_allowed(model: fxp.ParametrizedModule, inside: str) -> None:
    optimizer = torch.optim.SGD([model.c.weight] if inside == "other parameters" else list(model.parameters()), 0.1)
    with model.defer_backward():
        if inside == "no backward":
            model(X[0])
        elif inside == "other parameters":
            accumulate(model)
        else:
            with model.defer_backward():
                accumulate(model)
        optimizer.step()


def test_step_of_a_scaler_and_of_another_thread_is_refused(model: fxp.ParametrizedModule) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(fxp.DeferralError), model.defer_backward():
        scaler.scale(model(X[0]).sum()).backward()
        scaler.step(optimizer)
    found: list[BaseException] = []

    def step() -> None:
        try:
            optimizer.step()
        except fxp.DeferralError as error:
            found.append(error)

    with model.defer_backward():
        accumulate(model)
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    assert len(found) == 1


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, GeneratorExit])
def test_an_exception_discards(model: fxp.ParametrizedModule, error: type[BaseException]) -> None:
    with pytest.raises(error), model.defer_backward():
        accumulate(model)
        raise error
    assert grads(model)[A] is None and grads(model)[B] is None
    with model.defer_backward():
        accumulate(model)
    model.zero_grad()
    oracle = copy.deepcopy(model)
    accumulate(oracle)
    with model.defer_backward():
        accumulate(model)
    check(grads(model), grads(oracle))


def test_an_exception_keeps_later_losses(model: fxp.ParametrizedModule) -> None:
    oracle = copy.deepcopy(model)
    with pytest.raises(KeyError), model.defer_backward():
        late = model(X[0]).square().mean()
        accumulate(model, X[1:])
        raise KeyError
    model.zero_grad()
    late.backward()
    accumulate(oracle, X[:1])
    check(grads(model), grads(oracle))


def test_an_exception_of_an_inner_block_discards_only_its_own(model: fxp.ParametrizedModule) -> None:
    oracle = copy.deepcopy(model)
    with model.defer_backward():
        accumulate(model, X[:2])
        with contextlib.suppress(KeyError), model.defer_backward():
            accumulate(model, X[2:])
            raise KeyError
    accumulate(oracle, X[:2])
    check((grads(model)[A], grads(model)[B]), (grads(oracle)[A], grads(oracle)[B]))


def test_a_second_backward_is_refused_as_in_pytorch() -> None:
    oracle, model = pair()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss = oracle.a.weight.sum()
        loss.backward()
        loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"), model.defer_backward():
        loss = model.a.weight.sum()
        loss.backward()
        loss.backward()


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
@pytest.mark.parametrize("loss", [lambda m: m.a.weight.sum(), lambda m: m(X[0]).square().sum()], ids=["linear", "square"])
def test_create_graph_is_refused(model: fxp.ParametrizedModule, loss: Callable[[Any], Tensor]) -> None:
    text = (
        "backward(create_graph=True) inside defer_backward() would have to differentiate the deferred part; take this loss out "
        "of the block"
    )
    with pytest.raises(fxp.DeferralError, match=re.escape(text)), model.defer_backward():
        loss(model).backward(create_graph=True)
    model.zero_grad()


@pytest.mark.parametrize("create_graph", [False, True])
def test_grad_to_latents_inside_is_refused(model: fxp.ParametrizedModule, create_graph: bool) -> None:
    latents = list(model.latents().values())
    with model.defer_backward():
        loss = model(X[0]).sum()
        with pytest.raises(RuntimeError, match="not have been used in the graph"):
            torch.autograd.grad(loss, latents, create_graph=create_graph)


def test_a_latent_written_inside_that_its_map_needs_is_refused() -> None:
    model = fxp.transform(Net(), {"a.weight": fxp.custom(lambda latent: latent @ latent.mT, init=lambda w: w)})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), model.defer_backward():
        accumulate(model)
        with torch.no_grad():
            model.get_parameter(A).mul_(2.0)


def test_a_hook_that_raises_at_the_exit_is_heard_and_leaves_nothing(model: fxp.ParametrizedModule) -> None:
    def fail(gradient: Tensor) -> None:
        raise KeyError("from the hook")

    handle = model.get_parameter(A).register_hook(fail)
    with pytest.raises(KeyError, match="from the hook"), model.defer_backward():
        accumulate(model)
    handle.remove()
    model.zero_grad()
    oracle = copy.deepcopy(model)
    accumulate(oracle)
    with model.defer_backward():
        accumulate(model)
    check(grads(model), grads(oracle))
