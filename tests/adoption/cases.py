"""Models with parametrizations, legacy norms and pruning, and what of each is adopted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from adoption.common import Scaled, Symmetric, call, line, registered, weight_norm
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune


class Product(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.clone(), torch.eye(weight.shape[1])


class Widened(nn.Module):
    """Changes the shape, hence unsafe."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x * 2])


class Mixed(nn.Module):
    """A parametrization whose own weight is parametrized."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = parametrizations.orthogonal(nn.Linear(3, 3, bias=False))
        self.normed = weight_norm(nn.Linear(3, 3, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.normed(self.mixer(x))


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift: Tensor
        self.register_buffer("shift", torch.linspace(-1, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class Reader(nn.Module):
    """Reads the weight of its child, as MultiheadAttention does, instead of calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: Any = parametrizations.orthogonal(nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.inner.weight) @ self.inner.weight.T


def shared_twice() -> nn.Module:
    layer = registered(nn.Linear(3, 3), "weight", Symmetric())
    return nn.Sequential(layer, nn.Tanh(), layer)


def tied() -> nn.Module:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    return nn.Sequential(weight_norm(first), nn.Tanh(), second)


def shared_step() -> nn.Module:
    step = Scaled()
    return nn.Sequential(registered(nn.Linear(3, 3), "weight", step), nn.Tanh(), registered(nn.Linear(3, 3), "weight", step))


def globally_pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    prune.global_unstructured([(model[0], "weight"), (model[2], "weight")], prune.L1Unstructured, amount=0.5)
    return model


def pruned_twice() -> nn.Module:
    layer = prune.ln_structured(nn.Linear(3, 3), "weight", 1, n=2, dim=0)
    return prune.l1_unstructured(layer, "weight", 2)


class OwnPruning(prune.BasePruningMethod):
    """A pruning method of the user, as the tutorials write it: only the mask is his."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        mask = default_mask.clone()
        mask.view(-1)[::2] = 0
        return mask


def own_pruning() -> nn.Module:
    layer = nn.Linear(3, 3)
    OwnPruning.apply(layer, "weight")
    return layer


def masked() -> nn.Module:
    mask = torch.eye(3, dtype=torch.bool)
    return prune.custom_from_mask(nn.Linear(3, 3), "weight", mask)


def attention() -> nn.Module:
    layer = nn.MultiheadAttention(4, 2, batch_first=True)
    registered(layer, "in_proj_weight", Scaled())
    parametrizations.orthogonal(layer.out_proj)
    return layer


def lstm() -> nn.Module:
    layer = nn.LSTM(3, 2, num_layers=2, batch_first=True)
    for name in ("weight_hh_l0", "weight_hh_l1"):
        registered(layer, name, Scaled())
    return layer


def legacy_lstm() -> nn.Module:
    layer = nn.LSTM(3, 2, batch_first=True)
    return weight_norm(weight_norm(layer, "weight_hh_l0"), "weight_ih_l0", 1)


def signal() -> Tensor:
    return torch.randn(2, 3, 7)


def attend(model: nn.Module, x: Tensor) -> Tensor:
    return model(x, x, x, need_weights=False)[0]


def first(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)[0]


Case = tuple[Callable[[], nn.Module], Callable[[], Tensor], Callable[[nn.Module, Tensor], Tensor], list[str]]


# name: model, input, call, and "owner.tensor: origin" of what is adopted, in order
CASES: dict[str, Case] = {
    "one": (lambda: registered(nn.Linear(3, 3), "weight", Symmetric()), line, call, ["weight: parametrize"]),
    "chain": (
        lambda: registered(nn.Linear(3, 3), "weight", Symmetric(), Scaled()),
        *(line, call, ["weight: parametrize"]),
    ),
    "several originals": (
        lambda: registered(nn.Linear(3, 3), "weight", Product(), Scaled()),
        *(line, call, ["weight: parametrize"]),
    ),
    "unsafe": (
        lambda: registered(nn.Linear(3, 4, bias=False), "weight", Widened(), unsafe=True),
        *(line, call, ["weight: parametrize"]),
    ),
    "buffer": (lambda: registered(Shift(), "shift", Scaled()), line, call, ["shift: parametrize"]),
    "two tensors of one owner": (
        lambda: registered(registered(nn.Linear(3, 3), "bias", Scaled()), "weight", Symmetric()),
        *(line, call, ["bias: parametrize", "weight: parametrize"]),
    ),
    "shared module": (shared_twice, line, call, ["0.weight: parametrize"]),
    "shared step": (shared_step, line, call, ["0.weight: parametrize", "2.weight: parametrize"]),
    "nested": (lambda: registered(nn.Linear(3, 3), "weight", Mixed()), line, call, ["weight: parametrize"]),
    "read by the parent": (Reader, line, call, ["inner.weight: parametrize"]),
    "orthogonal, matrix exp": (
        lambda: parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map="matrix_exp"),
        *(line, call, ["weight: parametrize"]),
    ),
    "orthogonal, householder": (
        lambda: parametrizations.orthogonal(nn.Linear(3, 4), orthogonal_map="householder"),
        *(line, call, ["weight: parametrize"]),
    ),
    "new weight norm": (lambda: parametrizations.weight_norm(nn.Linear(3, 3)), line, call, ["weight: parametrize"]),
    "new spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(3, 4)), line, call, ["weight: parametrize"]),
    "weight norm, dim 0": (lambda: weight_norm(nn.Linear(3, 4)), line, call, ["weight: weight_norm hook"]),
    "weight norm, dim 1": (
        lambda: weight_norm(nn.Conv1d(3, 4, 3), dim=1),
        *(signal, call, ["weight: weight_norm hook"]),
    ),
    "weight norm, last dim": (
        lambda: weight_norm(nn.Conv1d(3, 4, 3), dim=2),
        *(signal, call, ["weight: weight_norm hook"]),
    ),
    "weight norm, dim None": (
        lambda: weight_norm(nn.ConvTranspose1d(3, 4, 3), dim=None),
        *(signal, call, ["weight: weight_norm hook"]),
    ),
    "weight norm, two tensors": (
        legacy_lstm,
        *(line, first, ["weight_hh_l0: weight_norm hook", "weight_ih_l0: weight_norm hook"]),
    ),
    "weight norm of one of two tied": (tied, line, call, ["0.weight: weight_norm hook"]),
    "spectral norm": (
        lambda: nn.utils.spectral_norm(nn.Linear(3, 4)),
        *(line, call, ["weight: spectral_norm hook"]),
    ),
    "spectral norm, transposed, 3 iterations": (
        lambda: nn.utils.spectral_norm(nn.ConvTranspose1d(3, 4, 3), n_power_iterations=3),
        *(signal, call, ["weight: spectral_norm hook"]),
    ),
    "spectral norm of a bias": (
        lambda: nn.utils.spectral_norm(nn.Linear(3, 4), "bias"),
        *(line, call, ["bias: spectral_norm hook"]),
    ),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(3, 4), "weight", 5), line, call, ["weight: prune"]),
    "pruned by a container": (pruned_twice, line, call, ["weight: prune"]),
    "pruned globally": (globally_pruned, line, call, ["0.weight: prune", "2.weight: prune"]),
    "pruned by a boolean mask": (masked, line, call, ["weight: prune"]),
    "pruned by a user's method": (own_pruning, line, call, ["weight: prune"]),
    "weight norm and a pruned bias": (
        lambda: prune.random_unstructured(weight_norm(nn.Linear(3, 4)), "bias", 2),
        *(line, call, ["weight: weight_norm hook", "bias: prune"]),
    ),
    "parametrize and legacy on one owner": (
        lambda: registered(prune.l1_unstructured(nn.Linear(3, 4), "weight", 5), "bias", Scaled()),
        *(line, call, ["bias: parametrize", "weight: prune"]),
    ),
    "attention": (
        attention,
        *(lambda: torch.randn(2, 5, 4), attend, ["in_proj_weight: parametrize", "out_proj.weight: parametrize"]),
    ),
    "lstm": (lstm, line, first, ["weight_hh_l0: parametrize", "weight_hh_l1: parametrize"]),
}
