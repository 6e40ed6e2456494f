"""Adoption: what was computed in the given model, computed by hand on the copy, gives the same values and gradients."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_copying import fingerprint
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.weight_norm import WeightNorm

from fxparam.errors import AdoptionError, ImageError
from fxparam.tracer.adoption import Adopted, MaskStep, SpectralNormStep, WeightNormStep
from fxparam.tracer.copying import Copied, structural_copy

TOLERANCE = 32 * torch.finfo(torch.float64).eps


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def weight_norm(module: nn.Module, name: str = "weight", dim: int | None = 0) -> nn.Module:
    """The legacy one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module, name, dim)  # type: ignore[arg-type]


# --- parametrizations -----------------------------------------------------------------------------------------------


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).T


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


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


def registered(module: nn.Module, name: str, *steps: nn.Module, unsafe: bool = False) -> nn.Module:
    for step in steps:
        parametrize.register_parametrization(module, name, step, unsafe=unsafe)
    return module


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


def line() -> Tensor:
    return torch.randn(5, 3)


def signal() -> Tensor:
    return torch.randn(2, 3, 7)


def attend(model: nn.Module, x: Tensor) -> Tensor:
    return model(x, x, x, need_weights=False)[0]


def first(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)[0]


def call(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


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


# --- the oracle -----------------------------------------------------------------------------------------------------


def weight_of(adopted: Adopted) -> Tensor:
    weight = adopted.steps[0](*adopted.originals)
    for step in adopted.steps[1:]:
        weight = step(weight)
    return weight


def delivery(adopted: Adopted) -> property:
    return property(lambda _: weight_of(adopted))


def attach(copied: Copied) -> nn.Module:
    """Deliver each adopted weight by a property, computed at each read."""
    owners = {id(adopted.owner): adopted.owner for adopted in copied.adopted}
    for key, owner in owners.items():
        names = {a.tensor_name: delivery(a) for a in copied.adopted if id(a.owner) == key}
        owner.__class__ = type(f"Attached{type(owner).__name__}", (type(owner),), names)
    return copied.root


def names_of(copied: Copied) -> list[str]:
    paths = {id(module): name for name, module in copied.root.named_modules()}
    return [f"{paths[id(a.owner)]}.{a.tensor_name}: {a.origin}".removeprefix(".") for a in copied.adopted]


def held(copied: Copied) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters and the buffers of the copy and of what was taken off it, each once, in a fixed order."""
    modules = [copied.root, *(step for adopted in copied.adopted for step in adopted.steps)]
    originals = [original for adopted in copied.adopted for original in adopted.originals]
    parameters = {id(p): p for p in (*(p for m in modules for p in m.parameters()), *originals)}
    buffers = {id(b): b for b in (*(b for m in modules for b in m.buffers()), *originals)}
    return (
        [p for p in parameters.values() if isinstance(p, nn.Parameter)],
        [b for b in buffers.values() if not isinstance(b, nn.Parameter)],
    )


Run = tuple[list[Tensor | None], list[Tensor]]


def run(
    model: nn.Module,
    use: Callable[[nn.Module, Tensor], Tensor],
    x: Tensor,
    parameters: list[Tensor],
    buffers: list[Tensor],
) -> Run:
    """Output and gradients, and what became of the buffers, which are then put back."""
    before = [buffer.clone() for buffer in buffers]
    output = use(model, x)
    cotangent = torch.linspace(-1, 1, output.numel()).view_as(output)
    gradients = torch.autograd.grad(output, [x, *parameters], cotangent, allow_unused=True)
    after = [buffer.clone() for buffer in buffers]
    with torch.no_grad():
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
    return [output.detach(), *gradients], after


def assert_same(got: Run, expected: Run) -> None:
    for actual, wanted in zip(got[0] + [*got[1]], expected[0] + [*expected[1]], strict=True):
        torch.testing.assert_close(actual, wanted, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("copy_tensors", [False, True], ids=["shared", "cloned"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_adopted_weights_compute_what_the_model_computes(case: str, training: bool, copy_tensors: bool) -> None:
    make, draw, use, expected_names = CASES[case]
    model = make().train(training)
    x = draw().requires_grad_()
    use(model, x).sum().backward()  # a model that has been trained: legacy weights now hang on a freed graph
    before = fingerprint(model)
    shared, copied = structural_copy(model), structural_copy(model, copy_tensors=copy_tensors)
    assert fingerprint(model) == before
    assert names_of(copied) == expected_names
    assert not copied.notes or case == "nested"

    parameters, buffers = held(shared)
    assert {id(t) for t in (*parameters, *buffers)} == {id(t) for t in (*model.parameters(), *model.buffers())}
    expected = run(model, use, x, parameters, buffers)
    assert_same(run(attach(copied), use, x, *held(copied)), expected)
    assert_same(run(model, use, x, parameters, buffers), expected)

    for adopted in copied.adopted:
        assert adopted.tensor_name not in {**vars(adopted.owner), **adopted.owner._parameters, **adopted.owner._buffers}
        assert not adopted.owner._forward_pre_hooks and "parametrizations" not in adopted.owner._modules
        assert adopted.is_buffer is (case == "buffer")
        assert all(isinstance(original, nn.Parameter) is not adopted.is_buffer for original in adopted.originals)
    use(model, x).sum().backward()  # the given model still trains
    if copy_tensors:
        assert all(parameter.grad is None for parameter in held(copied)[0])


@pytest.mark.parametrize("case", CASES)
def test_several_steps_of_training_stay_together(case: str) -> None:
    make, draw, use, _ = CASES[case]
    model = make()
    copied = structural_copy(model, copy_tensors=True)
    root = attach(copied)
    parameters, clones = held(structural_copy(model))[0], held(copied)[0]
    for _ in range(3):
        x = draw()
        for net, leaves in ((model, parameters), (root, clones)):
            loss = use(net, x).square().sum()
            if leaves:
                gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
                with torch.no_grad():
                    for leaf, gradient in zip(leaves, gradients, strict=True):
                        if gradient is not None:
                            leaf -= 0.01 * gradient
    for leaf, clone in zip(parameters, clones, strict=True):
        torch.testing.assert_close(clone, leaf, rtol=16 * TOLERANCE, atol=16 * TOLERANCE)


def test_a_spectral_norm_step_may_run_again_before_the_backward_of_its_first_run() -> None:
    model = nn.utils.spectral_norm(nn.Linear(3, 4))
    copied = structural_copy(model, copy_tensors=True)
    root, x, results = attach(copied), line(), []
    for net, leaves in ((model, held(structural_copy(model))[0]), (root, held(copied)[0])):
        results.append(torch.autograd.grad(net(x).sum() - net(-x).square().sum(), leaves))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


# --- names of checkpoints -------------------------------------------------------------------------------------------

NEW_FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm, dim 0": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
}


@pytest.mark.parametrize("case", ["weight norm, dim 0", "spectral norm", "pruned", "new weight norm"])
def test_legacy_names_lead_to_the_names_of_parametrize(case: str) -> None:
    model = CASES[case][0]()
    (adopted,) = structural_copy(model).adopted
    scheme = {f"parametrizations.weight.original{i}": o for i, o in enumerate(adopted.originals)}
    if len(adopted.originals) == 1:
        scheme = {"parametrizations.weight.original": adopted.originals[0]}
    for i, step in enumerate(adopted.steps):
        scheme |= {f"parametrizations.weight.{i}.{name}": tensor for name, tensor in step.state_dict(keep_vars=True).items()}
    state = model.state_dict(keep_vars=True)
    assert set(adopted.legacy_names.values()) == set(scheme)
    if case == "new weight norm":
        assert list(adopted.legacy_names) == ["weight_g", "weight_v"]
    else:
        assert {name: id(state[name]) for name in adopted.legacy_names} == {
            name: id(scheme[new]) for name, new in adopted.legacy_names.items()
        }
    if case in NEW_FORMS:
        assert set(NEW_FORMS[case](nn.Linear(3, 4)).state_dict()) == {*scheme, "bias"}


def test_other_parametrizations_have_no_legacy_names() -> None:
    (adopted,) = structural_copy(CASES["chain"][0]()).adopted
    assert dict(adopted.legacy_names) == {}


@pytest.mark.parametrize("case", ["weight norm, dim 0", "spectral norm", "pruned", "new weight norm"])
def test_hooks_for_checkpoints_go_and_those_of_the_user_stay(case: str) -> None:
    model = CASES[case][0]()

    def keep(*_: Any) -> None:
        return None

    model._register_load_state_dict_pre_hook(keep)
    model._register_state_dict_hook(keep)
    copied = structural_copy(model).root
    assert len(copied._load_state_dict_pre_hooks) == len(copied._state_dict_hooks) == 1
    assert next(iter(copied._state_dict_hooks.values())) is keep


# --- right inverses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_weight_norm_step_inverts(dim: int) -> None:
    weight, step = torch.randn(4, 3, 2), WeightNormStep(dim)
    torch.testing.assert_close(step(*step.right_inverse(weight)), weight, rtol=TOLERANCE, atol=TOLERANCE)


def test_spectral_norm_step_inverts_what_is_normed() -> None:
    u, s, v = torch.linalg.svd(torch.randn(4, 3), full_matrices=False)
    weight = u @ torch.diag(s / s[0]) @ v
    step = SpectralNormStep(u[:, 0].clone(), v[0].clone(), dim=0, n_power_iterations=1, eps=1e-12)
    torch.testing.assert_close(step(step.right_inverse(weight)), weight, rtol=TOLERANCE, atol=TOLERANCE)


def test_mask_step_inverts_what_is_pruned_and_refuses_the_rest() -> None:
    step = MaskStep(torch.eye(3))
    weight = torch.diag(torch.randn(3))
    assert step.right_inverse(weight) is weight
    with pytest.raises(ImageError, match=r"got a weight of shape \(3, 3\) with 6 entries .* type: weight \* mask"):
        step.right_inverse(torch.ones(3, 3))


# --- what stays -----------------------------------------------------------------------------------------------------


def test_a_parametrization_inside_a_parametrization_stays() -> None:
    model = CASES["nested"][0]()
    copied = structural_copy(model)
    (adopted,) = copied.adopted
    mixer, normed = adopted.steps[0].mixer, adopted.steps[0].normed
    old: Any = model.parametrizations.weight[0]  # type: ignore[union-attr, index]
    assert isinstance(mixer, nn.Module) and isinstance(normed, nn.Module)
    assert parametrize.is_parametrized(mixer, "weight") and type(mixer) is not type(old.mixer)
    assert len(normed._forward_pre_hooks) == 1
    assert copied.notes == tuple(
        f"parametrizations.weight.0.{name}: keeps its own parametrization, because it is part of another one"
        for name in ("mixer", "normed")
    )
    parametrize.remove_parametrizations(mixer, "weight")
    assert parametrize.is_parametrized(old.mixer, "weight") and type(mixer) is nn.Linear
    model(line())


def test_a_layer_that_another_parametrization_reads_stays() -> None:
    class From(nn.Module):
        def __init__(self, other: nn.Module) -> None:
            super().__init__()
            self.other: Any = other

        def forward(self, x: Tensor) -> Tensor:
            return x * self.other.weight

    first_layer = registered(nn.Linear(3, 3), "weight", Symmetric())
    model = nn.Sequential(first_layer, registered(nn.Linear(3, 3), "weight", From(first_layer)))
    copied = structural_copy(model)
    assert names_of(copied) == ["1.weight: parametrize"]
    assert copied.notes == ("0: keeps its own parametrization, because it is part of another one",)
    x = line()
    parameters, buffers = held(copied)
    x.requires_grad_()
    expected = run(model, call, x, parameters, buffers)
    assert_same(run(attach(copied), call, x, parameters, buffers), expected)


def hooked_list() -> nn.Module:
    model: Any = registered(nn.Linear(3, 3), "weight", Symmetric())
    model.parametrizations.weight.register_forward_hook(lambda m, a, out: out * 2)
    return registered(model, "bias", Scaled())


def pruned_original() -> nn.Module:
    model: Any = registered(nn.Linear(3, 3), "weight", Symmetric())
    prune.l1_unstructured(model.parametrizations.weight, "original", 4)
    return registered(model, "bias", Scaled())


def parametrized_original() -> nn.Module:
    model: Any = registered(nn.Linear(3, 3), "weight", Symmetric())
    registered(model.parametrizations.weight, "original", Scaled())
    return registered(model, "bias", Scaled())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (hooked_list, "because the list of its steps has hooks"),
        (pruned_original, "because the list of its steps has hooks"),
        (parametrized_original, "because the list itself is a ParametrizedParametrizationList"),
    ],
)
def test_a_list_that_does_more_than_its_steps_stays(make: Callable[[], nn.Module], reason: str) -> None:
    model = make()
    before = fingerprint(model)
    copied = structural_copy(model)
    assert fingerprint(model) == before
    assert names_of(copied) == ["bias: parametrize"]
    assert f"weight: keeps its torch parametrization, {reason}" in copied.notes
    x = line().requires_grad_()
    parameters, buffers = held(copied)
    expected = run(model, call, x, parameters, buffers)
    assert_same(run(attach(copied), call, x, parameters, buffers), expected)


class OwnWeightNorm(WeightNorm):
    """A hook of the user that only looks like weight norm."""

    def compute_weight(self, module: nn.Module) -> Any:
        return super().compute_weight(module) * 2


class OwnMasking(prune.L1Unstructured):
    """A pruning method that does more than multiply with its mask."""

    def apply_mask(self, module: nn.Module) -> Tensor:
        return super().apply_mask(module) * 2


def own_weight_norm() -> nn.Module:
    layer = nn.Linear(3, 3)
    weight_norm(layer)
    (key,) = layer._forward_pre_hooks
    layer._forward_pre_hooks[key] = OwnWeightNorm("weight", 0)
    return layer


def own_masking() -> nn.Module:
    layer = nn.Linear(3, 3)
    OwnMasking.apply(layer, "weight", 4)
    return layer


@pytest.mark.parametrize("make", [own_weight_norm, own_masking])
def test_an_unknown_hook_is_the_users_and_keeps_running(make: Callable[[], nn.Module]) -> None:
    model = make()
    copied = structural_copy(model)
    assert copied.adopted == () and len(copied.root._forward_pre_hooks) == 1
    x = line().requires_grad_()
    parameters, buffers = held(copied)
    expected = run(model, call, x, parameters, buffers)
    assert_same(run(copied.root, call, x, parameters, buffers), expected)


def test_a_module_dict_that_happens_to_be_called_parametrizations_is_left_alone() -> None:
    model = nn.Module()
    model.parametrizations = nn.ModuleDict({"weight": nn.Linear(2, 2)})
    copied = structural_copy(model)
    assert copied.adopted == () and type(copied.root) is nn.Module
    assert isinstance(copied.root.get_submodule("parametrizations.weight"), nn.Linear)


@pytest.mark.parametrize("case", [case for case in CASES if "hook" in CASES[case][3][0] or "prune" in CASES[case][3][0]])
def test_without_adoption_legacy_hooks_keep_running(case: str) -> None:
    make, draw, use, _ = CASES[case]
    model = make()
    x = draw().requires_grad_()
    use(model, x).sum().backward()
    copied = structural_copy(model, adopt=False)
    parameters, buffers = held(copied)
    assert copied.adopted == ()
    expected = run(model, use, x, parameters, buffers)
    assert_same(run(copied.root, use, x, parameters, buffers), expected)


# --- recurrent modules ----------------------------------------------------------------------------------------------


def test_no_stale_weight_stays_in_the_lists_of_a_recurrent_module() -> None:
    copied: Any = structural_copy(legacy_lstm()).root
    assert [w is None for w in copied._flat_weights] == [True, True, False, False]
    stale = [ref() for ref in copied._flat_weight_refs]
    assert stale[:2] == [None, None] and None not in copied._flat_weight_refs
    attached: Any = attach(structural_copy(lstm()))
    attached(line())
    assert all(isinstance(weight, Tensor) for weight in attached._flat_weights)
    with pytest.raises(AttributeError, match="weight_hh_l0"):
        _ = copied.weight_hh_l0


# --- what cannot be adopted -----------------------------------------------------------------------------------------


def pruned_direction() -> nn.Module:
    return prune.l1_unstructured(weight_norm(nn.Linear(3, 3)), "weight_v", 2)


def parametrized_direction() -> nn.Module:
    return registered(weight_norm(nn.Linear(3, 3)), "weight_v", Scaled())


def normed_original() -> nn.Module:
    return weight_norm(prune.l1_unstructured(nn.Linear(3, 3), "weight", 2), "weight_orig")


def twice_hooked() -> nn.Module:
    layer = weight_norm(nn.Linear(3, 3))
    (hook,) = layer._forward_pre_hooks.values()
    layer.register_forward_pre_hook(hook)
    return layer


def without_magnitude() -> nn.Module:
    layer = weight_norm(nn.Linear(3, 3))
    magnitude = layer._parameters.pop("weight_g")
    layer.__dict__["weight_g"] = magnitude
    return layer


def broken_by_a_deep_copy() -> nn.Module:
    layer = registered(nn.Linear(3, 3), "weight", Symmetric())
    parametrize.remove_parametrizations(copy.deepcopy(layer), "weight")
    return layer


LINEAR = "module '0' (Linear), tensor 'weight': "
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "pruned weight_v": (
        pruned_direction,
        "the weight_norm hook reads 'weight_v', which is itself computed (prune); expected a stored tensor; type "
        "torch.nn.utils.prune.remove(module, 'weight_v') and say it in the spec, or transform(..., adopt=False)",
    ),
    "parametrized weight_v": (
        parametrized_direction,
        "the weight_norm hook reads 'weight_v', which is itself computed (parametrize); expected a stored tensor; type "
        "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight_v') and say it in the spec, "
        "or transform(..., adopt=False)",
    ),
    "weight norm of weight_orig": (
        normed_original,
        "the prune reads 'weight_orig', which is itself computed (weight_norm hook); expected a stored tensor; type "
        "torch.nn.utils.remove_weight_norm(module, 'weight_orig') and say it in the spec, "
        "or transform(..., adopt=False)",
    ),
    "two hooks": (
        twice_hooked,
        "the weight_norm hook is one of 2 that compute it (weight_norm hook, weight_norm hook); expected one; keep one "
        "of them and type torch.nn.utils.remove_weight_norm(module, 'weight') for the other, "
        "or transform(..., adopt=False)",
    ),
    "no weight_g": (
        without_magnitude,
        "the weight_norm hook reads 'weight_g', which is neither a parameter nor a buffer of the module; type "
        "module.register_parameter('weight_g', ...) or transform(..., adopt=False)",
    ),
    "class changed": (
        broken_by_a_deep_copy,
        "expected the class that torch.nn.utils.parametrize generated, and found one that was changed afterwards "
        "(remove_parametrizations on a deep copy does that, and so does fully_shard); transform the model before, "
        "or type transform(..., adopt=False)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adopted_says_module_tensor_and_remedy(case: str) -> None:
    make, text = REFUSED[case]
    model = nn.Sequential(make())
    before = fingerprint(model)
    with pytest.raises(AdoptionError) as caught:
        structural_copy(model)
    assert str(caught.value).replace("(ParametrizedLinear)", "(Linear)") == LINEAR + text
    assert fingerprint(model) == before
    assert structural_copy(model, adopt=False).adopted == ()
