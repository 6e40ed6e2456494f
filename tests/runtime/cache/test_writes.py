"""Never stale: writes to latents, weights, buffers and options, casts, freezing."""
# mypy: disable-error-code="call-overload,operator"

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from runtime.cache.common import pair, same
from runtime.models import TwoLayers
from runtime.oracles import TRACES, loss_of
from torch import Tensor, nn

import fxparam as fxp


def _assign_data(module: nn.Module) -> None:
    for p in module.parameters():
        p.data = p.data * 1.5


def _in_place(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.5)


def _inference(module: nn.Module) -> None:
    with torch.inference_mode():
        for p in module.parameters():
            p.mul_(1.5)


def _copy(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(p * 1.5)


def _vector(module: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(module.parameters())
    nn.utils.vector_to_parameters(vector.detach() * 1.5, module.parameters())


def _load(module: nn.Module, assign: bool = False) -> None:
    module.load_state_dict({k: v * 1.5 for k, v in module.state_dict().items()}, assign=assign)


def _set(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.set_(p.detach() * 1.5)


def _new_parameter(module: nn.Module) -> None:
    for owner in module.modules():
        for name, p in list(owner._parameters.items()):
            if p is not None:
                owner._parameters[name] = nn.Parameter(p.detach() * 1.5)


def _foreach(module: nn.Module) -> None:
    with torch.no_grad():
        torch._foreach_mul_(list(module.parameters()), 1.5)


def _swapped(module: nn.Module) -> None:
    for p in module.parameters():
        torch.utils.swap_tensors(p, nn.Parameter(p.detach() * 1.5))


WRITES: dict[str, Callable[[nn.Module], None]] = {
    "data": _assign_data,
    "in-place": _in_place,
    "inference": _inference,
    "copy_": _copy,
    "vector_to_parameters": _vector,
    "load_state_dict": _load,
    "load_state_dict-assign": lambda module: _load(module, assign=True),
    "set_": _set,
    "new parameters": _new_parameter,
    "foreach": _foreach,
    "swap_tensors": _swapped,
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("name", WRITES)
def test_writes_are_seen(name: str, trace: str, mode: str) -> None:
    model, oracle = pair(trace)
    x = torch.randn(4, 5)
    for module in (model, oracle):
        module.train(mode == "train")
        with torch.no_grad():
            before = module(x)
        if name == "swap_tensors" and isinstance(module, fxp.ParametrizedModule):
            # The private graph of an entry refers to the latents, and PyTorch swaps nothing that a graph refers to.
            module.invalidate()
        WRITES[name](module)
    same(model(x), oracle(x))
    assert not torch.allclose(before, oracle(x))
    for module in (model, oracle):
        module.zero_grad()
        loss_of(module, x).backward()
    for (name, p), (other, q) in zip(model.named_parameters(), oracle.named_parameters(), strict=True):
        assert name == other and p.grad is not None and q.grad is not None
        same(p.grad, q.grad)


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_casts_are_seen(dtype: torch.dtype, trace: str) -> None:
    model, oracle = (fxp.transform(TwoLayers(), {"*.weight": fxp.weight_norm()}, trace=trace) for _ in range(2))
    oracle.load_state_dict(model.state_dict())
    x = torch.randn(4, 5)
    before = model(x)
    model.to(dtype)
    assert model(x.to(dtype)).dtype == dtype
    assert all(weight.dtype == dtype for weight in model.weights().values())
    torch.testing.assert_close(model(x.to(dtype)).double(), before, rtol=0.05, atol=0.05)
    loss_of(model, x.to(dtype)).backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())
    # And back: the values went through the narrow type, for both.
    oracle.to(dtype)
    model.double()
    oracle.double()
    same(model(x), oracle(x))


def test_cast_of_a_submodule() -> None:
    model, _ = pair()
    x = torch.randn(4, 5)
    model(x)
    model.first.float()
    assert model.weights()["first.weight"].dtype == torch.float32
    assert model.weights()["second.weight"].dtype == torch.float64


def test_exponential_average_swapped_in_for_evaluation() -> None:
    model, oracle = pair()
    x = torch.randn(4, 5)
    outputs = []
    for module in (model, oracle):
        module.train()
        loss_of(module, x).backward()
        kept = [p.data.clone() for p in module.parameters()]
        for p in module.parameters():
            p.data.copy_(p.data * 0.5)
        module.eval()
        averaged = module(x).detach()
        for p, old in zip(module.parameters(), kept, strict=True):
            p.data.copy_(old)
        module.train()
        outputs.append((averaged, module(x).detach()))
    same(outputs[0][0], outputs[1][0])
    same(outputs[0][1], outputs[1][1])
    assert not torch.allclose(*outputs[1])


def test_a_write_nothing_can_see_and_invalidate() -> None:
    model, oracle = pair()
    x = torch.randn(4, 5)
    for module in (model, oracle):
        module.eval()
        module(x)
        for p in module.parameters():
            p.data.mul_(1.5)
    # The documented limit of the cache; should this ever pass, the page on caching has to change.
    assert not torch.allclose(model(x), oracle(x))
    model.invalidate()
    same(model(x), oracle(x))


def test_check_turns_it_into_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXPARAM_CHECK", "1")
    model, _ = pair()
    x = torch.randn(4, 5)
    model.eval()
    model(x)
    model(x)
    next(iter(model.latents().values())).data.mul_(1.5)
    with pytest.raises(fxp.StaleWeightsError, match=r"first\.weight was cached.*call model\.invalidate\(\)"):
        model(x)
    model.invalidate()
    model(x)


def test_check_is_silent_while_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXPARAM_CHECK", "1")
    model, _ = pair()
    optimizer = torch.optim.Adam(model.parameters(), 0.1, fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, torch.randn(4, 5)).backward()
        optimizer.step()


def test_write_to_a_delivered_weight_is_undone_at_the_next_forward() -> None:
    model, oracle = pair()
    x = torch.randn(4, 5)
    with torch.no_grad():
        model.first.weight.zero_()
        with pytest.warns(RuntimeWarning, match=r"first\.weight was written in place, and the write does not last"):
            model.weights()["second.weight"].fill_(7.0)
    with pytest.warns(RuntimeWarning, match=r"second\.weight was written in place"):
        same(model(x), oracle(x))


def test_assignment_through_the_property() -> None:
    model, _ = pair()
    x = torch.randn(4, 5)
    model(x)
    value = torch.randn(5, 5)
    with torch.no_grad():
        model.first.weight = nn.Parameter(value)
    same(model.first.weight.detach(), value)
    same(model(x), model.second(torch.tanh(F.linear(x, value, model.first.bias))))
    assert "weight" not in model.first._parameters


class Scaled(nn.Module):
    """A map that reads a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(2.0))
        self.rate = 1.0

    def forward(self, latent: Tensor) -> Tensor:
        return latent * self.factor * self.rate

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / (self.factor * self.rate)


@pytest.mark.parametrize("trace", TRACES)
def test_buffers_and_options_of_maps(trace: str) -> None:
    net, scaled = TwoLayers(), Scaled()
    model = fxp.transform(net, {"first.weight": scaled}, trace=trace)
    weight = net.first.weight.detach()
    same(model.first.weight.detach(), weight)
    scaled.factor.fill_(4.0)
    same(model.first.weight.detach(), 2 * weight)
    scaled.rate = 0.5
    same(model.first.weight.detach(), weight)
    scaled.register_buffer("factor", torch.tensor(8.0))
    same(model.first.weight.detach(), 2 * weight)


@pytest.mark.parametrize("trace", TRACES)
def test_closures_of_functions(trace: str) -> None:
    options = {"rate": 1.0}
    net = TwoLayers()
    model = fxp.transform(net, {"first.weight": lambda latent: latent * options["rate"]}, trace=trace)
    options["rate"] = 3.0
    model.invalidate()
    same(model.first.weight.detach(), 3 * net.first.weight.detach())


def test_freezing() -> None:
    model, oracle = pair()
    x = torch.randn(4, 5)
    loss_of(model, x).backward()
    model.zero_grad()
    names = model.freeze("first.*")
    assert names == ["first.parametrizations.weight.original0", "first.parametrizations.weight.original1"]
    for name, p in oracle.named_parameters():
        p.requires_grad_(name not in names)
    for module in (model, oracle):
        loss_of(module, x).backward()
    for (_, p), (_, q) in zip(model.named_parameters(), oracle.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None and q.grad is not None:
            same(p.grad, q.grad)
    assert not model.weights()["first.weight"].requires_grad
    model.unfreeze("first.*")
    model.zero_grad()
    loss_of(model, x).backward()
    assert all(p.grad is not None for p in model.parameters())
