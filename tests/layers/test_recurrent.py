"""``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``: every tensor they hold can be computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers.common import (
    FLAT,
    TRACES,
    Case,
    Check,
    Tanh2,
    check_eval,
    every_check,
    made,
    outputs_of,
    same,
    step,
    tensors,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import fxparam as fxp

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def steps_of(*size: int) -> tuple[Tensor]:
    return (torch.randn(*(size or (5, 3, 4))),)


def packed(sorted_: bool) -> tuple[Any, ...]:
    lengths = (5, 3, 2) if sorted_ else (2, 5, 3)
    return (pack_sequence([torch.randn(n, 4) for n in lengths], enforce_sorted=sorted_),)


class Padded(nn.Module):
    """Packs its padded input, and pads what it returns."""

    def __init__(self, enforce_sorted: bool) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True)
        self.enforce_sorted = enforce_sorted

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        sequences = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=self.enforce_sorted)
        return pad_packed_sequence(self.rnn(sequences)[0], batch_first=True)[0]


class Flattening(nn.Module):
    """Calls ``flatten_parameters`` in its forward, as models for several devices do."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 6, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.rnn.flatten_parameters()
        return self.rnn(x)[0]


class ReadsAll(nn.Module):
    """Reads the weights through the lists that RNNs keep."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        penalty = torch.stack([w.square().sum() for layer in self.rnn.all_weights for w in layer]).sum()
        return self.rnn(x)[0], penalty


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn, self.head = nn.Embedding(9, 4), nn.LSTM(4, 4, 2), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(tokens))[0])


KINDS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
CASES: dict[str, Case] = {
    **{name: Case(lambda cls=cls: cls(4, 4), ("weight_hh_l0",), steps_of) for name, cls in KINDS.items()},  # type: ignore[misc]
    **{
        f"{name} stacked": Case(lambda cls=cls: cls(4, 6, 3), ("weight_*_l*",), steps_of)  # type: ignore[misc]
        for name, cls in KINDS.items()
    },
    **{
        f"{name} both ways": Case(
            lambda cls=cls: cls(4, 6, 2, bidirectional=True, batch_first=True),  # type: ignore[misc]
            ("weight_hh_l*", "bias_*"),
            steps_of,
            FLAT,
        )
        for name, cls in KINDS.items()
    },
    "RNN relu": Case(lambda: nn.RNN(4, 4, nonlinearity="relu"), ("weight_hh_l0",), steps_of),
    "projections": Case(lambda: nn.LSTM(4, 6, 2, proj_size=3, bidirectional=True), ("weight_hr_*", "weight_hh*"), steps_of),
    "no bias": Case(lambda: nn.GRU(4, 6, 2, bias=False), ("weight_hh_l*",), steps_of),
    "all": Case(lambda: nn.LSTM(4, 6, 2, proj_size=3), ("*",), steps_of, FLAT),
    "unbatched": Case(lambda: nn.LSTM(4, 6), ("weight_hh_l0",), lambda: steps_of(5, 4)),
    "dropout": Case(lambda: nn.LSTM(4, 6, 3, dropout=0.5), ("weight_hh_l*",), steps_of),
    "state of LSTM": Case(
        lambda: nn.LSTM(4, 6, 2),
        ("weight_hh_l*",),
        lambda: (torch.randn(5, 3, 4), (torch.randn(2, 3, 6), torch.randn(2, 3, 6))),
    ),
    "state of GRU": Case(lambda: nn.GRU(4, 6), ("weight_?h_l*",), lambda: (torch.randn(5, 3, 4), torch.randn(1, 3, 6))),
    "packed": Case(lambda: nn.LSTM(4, 6, 2), ("weight_hh_l*",), lambda: packed(True), folds=False),
    "packed unsorted": Case(lambda: nn.GRU(4, 6, bidirectional=True), ("weight_hh_l*",), lambda: packed(False), folds=False),
    "padded": Case(
        lambda: Padded(True), ("rnn.weight_*",), lambda: (torch.randn(3, 5, 4), torch.tensor([5, 3, 2])), folds=False
    ),
    "padded unsorted": Case(
        lambda: Padded(False), ("rnn.weight_*",), lambda: (torch.randn(3, 5, 4), torch.tensor([2, 5, 3])), folds=False
    ),
    "flattening": Case(Flattening, ("rnn.weight_hh_l*",), steps_of),
    "reads all": Case(ReadsAll, ("rnn.weight_*",), steps_of),
    "language model": Case(LanguageModel, ("rnn.weight_hh_l*", "embedding.weight"), lambda: (torch.randint(9, (5, 3)),)),
}


@every_check(CASES, kinds=2)
def test_what_every_layer_must_do(check: Check, case: Case, kind: str, trace: str) -> None:
    check(case, kind, trace)


@pytest.mark.parametrize("trace", TRACES)
def test_computed_weights_are_evaluated_once_for_all_their_reads(trace: str) -> None:
    model = fxp.transform(nn.LSTM(4, 4, 2), {"weight_*": fxp.weight_norm()}, trace=trace)
    for _ in range(3):
        model(*steps_of())
    assert model.stats.refreshes == 1


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
def test_one_recurrent_weight_shared_between_layers_by_ref(cls: Callable[..., nn.RNNBase], trace: str) -> None:
    net = cls(4, 4, 3)
    spec = {"weight_hh_l0": fxp.orthogonal(), "weight_hh_l[12]": fxp.ref("weight_hh_l0")}
    model = fxp.transform(net, spec, trace=trace, copy=True)
    plain = copy.deepcopy(net)
    (x,) = steps_of()
    for _ in range(2):
        with torch.no_grad():
            for number in range(3):
                plain.get_parameter(f"weight_hh_l{number}").copy_(model.weights()["weight_hh_l0"])
        model.zero_grad()
        plain.zero_grad()
        weight = model.weight_hh_l0
        want, got = plain(x)[0], model(x)[0]
        same(got, want)
        want.sin().sum().backward()
        total = torch.stack([p.grad for n, p in plain.named_parameters() if "weight_hh" in n and p.grad is not None]).sum(0)
        (latent,) = model.latents().values()
        (through,) = torch.autograd.grad(weight, latent, total)
        got.sin().sum().backward()
        same(latent.grad, through)
        for name in ("weight_ih_l0", "bias_hh_l2"):
            same(model.get_parameter(name).grad, plain.get_parameter(name).grad)
        torch.optim.SGD(model.parameters(), 0.05).step()
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                if "weight_hh" not in name:
                    parameter.copy_(model.get_parameter(name))


@pytest.mark.parametrize("trace", TRACES)
def test_a_weight_tied_between_layers_stays_one_weight(trace: str) -> None:
    net = nn.GRU(4, 4, 2)
    net.weight_hh_l1 = net.weight_hh_l0
    case = Case(lambda: net, ("weight_hh_l1",), steps_of)
    model, oracle = made(case, "weight_norm", trace)
    assert len(model.sites) == 1
    for seed in range(2):
        step(model, oracle, case, seed)
        check_eval(model, oracle, case, seed)
    assert model.weight_hh_l0.data_ptr() == model.weight_hh_l1.data_ptr()


@pytest.mark.parametrize("trace", TRACES)
def test_flattening_from_outside_changes_nothing(trace: str) -> None:
    case = Case(lambda: nn.LSTM(4, 6, 2), ("weight_hh_l*",), steps_of)
    model, oracle = made(case, "orthogonal", trace)
    for seed in range(2):
        model.flatten_parameters()
        check_eval(model, oracle, case, seed)
        model.train()
        step(model, oracle, case, seed)


@pytest.mark.parametrize("trace", TRACES)
def test_a_plain_weight_beside_a_computed_one_can_be_replaced(trace: str) -> None:
    case = Case(lambda: nn.LSTM(4, 6), ("weight_hh_l0",), steps_of)
    model, oracle = made(case, "weight_norm", trace)
    outputs_of(model, case, 0)
    model.weight_ih_l0 = nn.Parameter(torch.randn(24, 4))
    oracle.follow(model)
    check_eval(model, oracle, case, 0)
    step(model, oracle, case, 0)
    check_eval(model, oracle, case, 1)


@pytest.mark.parametrize("trace", TRACES)
def test_float32_weights_in_a_float32_layer(trace: str) -> None:
    case = Case(lambda: nn.LSTM(4, 6, 2), ("weight_hh_l*",), steps_of)
    model, _ = made(case, "orthogonal", trace)
    (x,) = steps_of()
    want = model(x)[0].detach()
    model.to(torch.float32)
    got = model(x.to(torch.float32))[0]
    assert got.dtype is torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="does not match weight dtype"):
        model(x)


@pytest.mark.parametrize("trace", TRACES)
def test_adopted_weights_of_a_recurrent_layer(trace: str) -> None:
    net = nn.LSTM(4, 4, 2)
    for name in ("weight_hh_l0", "weight_hh_l1", "bias_ih_l0"):
        torch.nn.utils.parametrize.register_parametrization(net, name, Tanh2())
    model = fxp.transform(net, trace=trace, copy=True)
    assert list(model.state_dict()) == list(net.state_dict())
    (x,) = steps_of()
    for _ in range(2):
        same(model(x)[0], net(x)[0])
        for module in (model, net):
            module.zero_grad()
            module(x)[0].sin().sum().backward()
            torch.optim.SGD(module.parameters(), 0.05).step()
        same([p.grad for p in model.parameters()], [p.grad for p in net.parameters()])


class Wrapped(nn.GRU):
    """A recurrent layer of a user's, with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("make", [lambda: nn.LSTM(4, 4), lambda: Wrapped(4, 4), lambda: nn.Sequential(Wrapped(4, 4))])
def test_a_recurrent_layer_as_the_model_with_an_empty_spec(make: Callable[[], nn.Module], trace: str) -> None:
    net = make()
    model = fxp.transform(net, trace=trace)
    for seed in range(3):
        x = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(seed))
        same(tensors(model(x)), tensors(net(x)))
