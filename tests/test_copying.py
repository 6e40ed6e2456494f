"""The structural copy: what it rebuilds, what it shares, and that the given model stays as it is."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize

from fxparam.tracer.copying import structural_copy

HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


def fingerprint(model: nn.Module) -> list[Any]:
    """All that must not change: classes, attributes, hooks, tensors by identity, version and value, the generator."""
    print_: list[Any] = [torch.get_rng_state().tolist()]
    for name, module in model.named_modules(remove_duplicate=False):
        print_.append((name, id(module), type(module), sorted(vars(type(module)), key=str)))
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for key, value in vars(module).items():
            print_.append((key, id(value)))
            if isinstance(value, dict):
                print_.append([(k, id(v)) for k, v in value.items()])
            if isinstance(value, list | tuple):
                print_.append([id(v) for v in value])
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                grad = None if tensor.grad is None else tensor.grad.tolist()
                print_.append((key, type(tensor), tensor._version, tensor.requires_grad, tensor.tolist(), grad))
    return print_


class Holder(nn.Module):
    """A module with a layer, and one more attribute that a test puts in."""

    def __init__(self, reference: Callable[[Holder], Any] | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        if reference is not None:
            self.__dict__["reference"] = reference(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def named(self, _: str = "") -> nn.Module:
        return self.layer


class Pair(NamedTuple):
    first: Any
    second: Any


class Tagged(dict[str, Any]):
    tag: Any = None


class AttributeDict(dict[str, Any]):
    def __init__(self, **entries: Any) -> None:
        super().__init__(**entries)
        self.__dict__ = self


class Slotted:
    __slots__ = ("__weakref__", "module", "unset")

    def __init__(self, module: nn.Module) -> None:
        self.module = module


@dataclasses.dataclass(frozen=True)
class Value:
    module: nn.Module


class Plain:
    def __init__(self, module: nn.Module) -> None:
        self.module, self.me = module, self

    def __copy__(self) -> Any:
        raise RuntimeError("user code must not run")

    def get(self) -> nn.Module:
        return self.module


def closure_over(module: nn.Module) -> Callable[[], nn.Module]:
    def inner() -> nn.Module:
        return module

    return inner


def default_over(module: nn.Module) -> Callable[..., nn.Module]:
    def inner(*, found: nn.Module = module) -> nn.Module:
        return found

    return inner


def cyclic(module: nn.Module) -> list[Any]:
    items: list[Any] = [module]
    items.append(items)
    return items


def tagged(module: nn.Module) -> Tagged:
    table = Tagged(a=1)
    table.tag = module
    return table


# name: how the attribute is made, and how the module is read back from it
REFERENCES: dict[str, tuple[Callable[[Holder], Any], Callable[[Any], Any]]] = {
    "module outside _modules": (lambda m: m.layer, lambda r: r),
    "list": (lambda m: [m.layer], lambda r: r[0]),
    "nested containers": (lambda m: {"a": [(m.layer,)]}, lambda r: r["a"][0][0]),
    "dict key": (lambda m: {m.layer: 1}, lambda r: next(iter(r))),
    "set": (lambda m: {m.layer}, lambda r: next(iter(r))),
    "set of values": (lambda m: {Value(m.layer)}, lambda r: next(v.module for v in r if Value(v.module) in r)),
    "frozenset": (lambda m: frozenset({m.layer}), lambda r: next(iter(r))),
    "deque": (lambda m: collections.deque([m.layer], 4), lambda r: r[r.maxlen - 4]),
    "ordered dict": (lambda m: collections.OrderedDict(a=m.layer), lambda r: r["a"]),
    "default dict": (lambda m: collections.defaultdict(m.named), lambda r: r["new"]),
    "named tuple": (lambda m: Pair(m.layer, 1), lambda r: r.first),
    "dict subclass": (lambda m: tagged(m.layer), lambda r: r.tag),
    "dict that is its attributes": (
        lambda m: AttributeDict(a=m.layer),
        lambda r: r.__dict__["a"] if r.__dict__ is r else None,
    ),
    "namespace": (lambda m: types.SimpleNamespace(a=m.layer), lambda r: r.a),
    "cyclic list": (lambda m: cyclic(m.layer), lambda r: r[1][1][0]),
    "bound method": (lambda m: m.named, lambda r: r()),
    "built-in bound method": (lambda m: {"a": m.layer}.get, lambda r: r("a")),
    "partial": (lambda m: functools.partial(m.named, "x"), lambda r: r()),
    "cached method": (lambda m: functools.lru_cache(m.named), lambda r: r()),
    "closure": (lambda m: closure_over(m.layer), lambda r: r()),
    "default argument": (lambda m: default_over(m.layer), lambda r: r()),
    "weak reference": (lambda m: weakref.ref(m.layer), lambda r: r()),
    "weak method": (lambda m: weakref.WeakMethod(m.named), lambda r: r()()),
    "weak proxy": (lambda m: weakref.proxy(m.layer), lambda r: r.__init__.__self__),
    "weak set": (lambda m: weakref.WeakSet([m.layer]), lambda r: next(iter(r))),
    "weak keys": (lambda m: weakref.WeakKeyDictionary({m.layer: 1}), lambda r: next(iter(r))),
    "weak values": (lambda m: weakref.WeakValueDictionary({"a": m.layer}), lambda r: r["a"]),
    "object": (lambda m: Plain(m.layer), lambda r: r.me.get()),
    "object with slots": (lambda m: Slotted(m.layer), lambda r: r.module),
}


@pytest.mark.parametrize("case", REFERENCES)
def test_every_reference_to_a_module_leads_to_its_copy(case: str) -> None:
    make, read = REFERENCES[case]
    model = Holder(make)
    before = fingerprint(model)
    copied = structural_copy(model)
    assert isinstance(copied.root, Holder)
    assert read(copied.root.__dict__["reference"]) is copied.root.layer
    assert read(model.__dict__["reference"]) is model.layer
    assert copied.root.layer is not model.layer
    assert type(copied.root.__dict__["reference"]) is type(model.__dict__["reference"])
    assert case == "default dict" or fingerprint(model) == before  # reading a default dict writes to it
    assert copied.notes == ()


def test_tensors_are_shared_and_containers_are_not() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model.register_parameter("absent", None)
    new: Any = structural_copy(model).root
    assert [(n, id(t)) for n, t in new.named_parameters()] == [(n, id(t)) for n, t in model.named_parameters()]
    assert [(n, id(t)) for n, t in new.named_buffers()] == [(n, id(t)) for n, t in model.named_buffers()]
    for old_module, new_module in zip(model.modules(), new.modules(), strict=True):
        assert type(old_module) is type(new_module)
        assert list(vars(old_module)) == list(vars(new_module))
        for table in ("_parameters", "_buffers", "_modules", *HOOKS):
            assert vars(old_module)[table] is not vars(new_module)[table]
            assert type(vars(old_module)[table]) is type(vars(new_module)[table])
    new[0].register_parameter("extra", nn.Parameter(torch.zeros(1)))
    del new[1]
    new.eval()
    assert len(model) == 2 and model.training and not hasattr(model[0], "extra")


def test_state_kept_in_a_plain_container_is_the_copys_own() -> None:
    model: Any = Holder()
    model.seen = {"shapes": []}
    new: Any = structural_copy(model).root
    new.seen["shapes"].append(1)
    assert model.seen == {"shapes": []}


def test_objects_that_lead_to_no_module_are_shared() -> None:
    model: Any = Holder()
    config = types.SimpleNamespace(width=3)
    model.config = config
    model.activation = torch.relu
    model.scale = functools.partial(torch.mul, other=2)
    new: Any = structural_copy(model).root
    assert new.config is config and new.activation is torch.relu and new.scale is model.scale


def test_user_hooks_run_on_the_copy_and_refer_to_it() -> None:
    model = Holder()
    seen: list[tuple[str, nn.Module]] = []
    other = model.layer

    def forward_hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(("forward", module))
        return output + other.bias

    handle = model.layer.register_forward_hook(forward_hook)
    model.register_forward_pre_hook(lambda m, a, k: seen.append(("pre", m)), with_kwargs=True)
    model.layer.register_full_backward_hook(lambda m, gi, go: seen.append(("backward", m)))
    model.layer._register_load_state_dict_pre_hook(lambda m, *a: seen.append(("load", m)), with_module=True)
    model.layer.register_state_dict_post_hook(lambda m, *a: seen.append(("save", m)))
    model.handle = handle  # type: ignore[assignment]
    x = torch.randn(2, 3)
    expected = model(x)
    seen.clear()

    new: Any = structural_copy(model).root
    torch.testing.assert_close(new(x), expected, rtol=0, atol=0)
    new(x.requires_grad_()).sum().backward()
    new.load_state_dict(new.state_dict())
    kinds = [kind for kind, _ in seen]
    assert set(kinds) == {"forward", "pre", "backward", "load", "save"}
    assert {id(module) for _, module in seen} == {id(new), id(new.layer)}
    assert closure_cell(next(iter(new.layer._forward_hooks.values())), "other") is new.layer

    new.handle.remove()
    assert not new.layer._forward_hooks and len(model.layer._forward_hooks) == 1
    new.load_state_dict(model.state_dict())


def closure_cell(function: Any, name: str) -> Any:
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


class Parent(nn.Module):
    """A parent that its child knows, by a plain and by a weak reference: cycles in attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.child: Any = Holder()
        self.child.__dict__["parent"] = self
        self.child.__dict__["weak_parent"] = weakref.ref(self)
        self.again = self.child
        self.forward = functools.partial(Parent.run, self)

    def run(self, x: Tensor) -> Tensor:
        return self.child(x) + self.child.parent.again(x)


def test_shared_modules_stay_shared_and_cycles_close() -> None:
    model = Parent()
    copied = structural_copy(model)
    new: Any = copied.root
    assert new.child is new.again and new.child.parent is new and new.child.weak_parent() is new
    assert new.forward.args[0] is new
    x = torch.randn(2, 3)
    torch.testing.assert_close(new(x), model(x), rtol=0, atol=0)
    assert copied.memo == {id(model): new, id(model.child): new.child, id(model.child.layer): new.child.layer}


def test_a_weak_reference_out_of_the_model_is_left_and_noted() -> None:
    model = Parent()
    del model.child.__dict__["parent"]
    copied = structural_copy(model.child)
    new: Any = copied.root
    assert new.weak_parent() is model
    assert copied.notes == ("weak_parent: refers weakly to a module outside of the model, which is not copied",)


class Demanding(nn.Module):
    """A module whose construction, attribute access and copying are all its own."""

    __slots__ = ("kept",)
    kept: Any
    made = 0

    def __new__(cls, width: int) -> Demanding:
        cls.made += 1
        return super().__new__(cls)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        object.__setattr__(self, "kept", self.layer)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("magic_"):
            return name
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("training", "layer") and not name.startswith("_"):
            raise RuntimeError("user code must not run")
        super().__setattr__(name, value)

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("user code must not run")

    def __getstate__(self) -> Any:
        raise RuntimeError("user code must not run")

    def forward(self, x: Tensor) -> Tensor:
        return self.kept(x)


def test_modules_with_slots_and_custom_attribute_access() -> None:
    model = Demanding(3)
    made = Demanding.made
    new: Any = structural_copy(model).root
    assert Demanding.made == made
    assert new.kept is new.layer is not model.layer and new.magic_word == "magic_word"
    x = torch.randn(2, 3)
    torch.testing.assert_close(new(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(3))]),
        lambda: nn.ParameterDict({"a": nn.Parameter(torch.ones(2)), "b": torch.zeros(3)}),
        lambda: nn.ModuleList([nn.Linear(2, 2), nn.ReLU()]),
        lambda: nn.ModuleDict({"a": nn.Linear(2, 2)}),
        lambda: nn.Sequential(collections.OrderedDict(a=nn.Linear(2, 2), b=nn.Tanh())),
        lambda: nn.LSTM(2, 3, num_layers=2, bidirectional=True),
        lambda: nn.TransformerEncoderLayer(4, 2, 8),
    ],
    ids=["ParameterList", "ParameterDict", "ModuleList", "ModuleDict", "Sequential", "LSTM", "TransformerEncoderLayer"],
)
def test_torchs_own_modules(make: Callable[[], nn.Module]) -> None:
    model = make()
    before = fingerprint(model)
    new = structural_copy(model).root
    assert repr(new) == repr(model)
    assert [(n, id(t)) for n, t in new.named_parameters()] == [(n, id(t)) for n, t in model.named_parameters()]
    assert [n for n, _ in new.named_modules()] == [n for n, _ in model.named_modules()]
    assert fingerprint(model) == before


def test_recurrent_modules_have_their_own_lists() -> None:
    model = nn.LSTM(2, 3)
    new: Any = structural_copy(model).root
    assert new._flat_weights is not model._flat_weights
    assert new._flat_weight_refs is not model._flat_weight_refs
    x = torch.randn(4, 1, 2)
    expected = model(x)[0]
    new.weight_hh_l0 = nn.Parameter(torch.zeros(12, 3))
    torch.testing.assert_close(model(x)[0], expected, rtol=0, atol=0)
    assert not torch.equal(new(x)[0], expected)


def test_lazy_modules_are_copied_and_become_what_they_are_apart() -> None:
    model: Any = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
    new: Any = structural_copy(model, copy_tensors=True).root
    assert isinstance(new[0], nn.LazyLinear)
    assert new(torch.ones(2, 5)).shape == (2, 3)
    assert type(new[0]) is nn.Linear and type(model[0]) is nn.LazyLinear
    assert model(torch.ones(2, 4)).shape == (2, 3)
    assert not model[0]._forward_pre_hooks and not new[0]._forward_pre_hooks


def scripted(module: nn.Module) -> nn.Module:
    with pytest.warns(DeprecationWarning):
        return torch.jit.script(module)


@pytest.mark.parametrize("copy_tensors", [False, True])
def test_script_modules_are_shared_with_a_note(copy_tensors: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), scripted(nn.Linear(2, 2)))
    copied = structural_copy(model, copy_tensors=copy_tensors)
    root: Any = copied.root
    assert root[1] is model[1] and root[0] is not model[0]
    assert copied.notes == ("1: a ScriptModule cannot be copied and is shared",)
    x = torch.randn(1, 2)
    torch.testing.assert_close(copied.root(x), model(x), rtol=0, atol=0)


class Sealed(dict[str, Any]):
    """A class on top of a built-in type, which cannot be made without its arguments."""

    def __new__(cls, module: nn.Module) -> Sealed:
        return super().__new__(cls)

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module=module)


def test_what_cannot_be_copied_is_noted() -> None:
    model = Holder(lambda m: Sealed(m.layer))
    copied = structural_copy(model)
    assert copied.root.__dict__["reference"] is model.__dict__["reference"]
    (note,) = copied.notes
    assert note.startswith("reference: cannot be copied and still refers to the given model (")


def test_graph_modules_get_a_graph_and_a_class_of_their_own() -> None:
    model = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    new: Any = structural_copy(nn.Sequential(model)).root.get_submodule("0")
    x = torch.randn(3, 2)
    expected = model(x)
    torch.testing.assert_close(new(x), expected, rtol=0, atol=0)
    assert new.graph.owning_module is new and model.graph.owning_module is model
    (relu,) = (node for node in new.graph.nodes if node.target == "1")
    relu.replace_all_uses_with(relu.args[0])
    new.graph.erase_node(relu)
    new.recompile()
    torch.testing.assert_close(new(x), model.get_submodule("0")(x), rtol=0, atol=0)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_compiled_calls_are_dropped_and_compiled_wrappers_wrap_the_copy() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.compile(backend="eager")
    copied = structural_copy(model)
    assert copied.notes == ("(root): the compiled call was dropped; type .compile() on the result",)
    assert copied.root._compiled_call_impl is None and model._compiled_call_impl is not None

    wrapped: Any = torch.compile(nn.Linear(2, 2), backend="eager")
    x = torch.randn(3, 2)
    expected = wrapped(x)
    new: Any = structural_copy(wrapped).root
    torch.testing.assert_close(new(x), expected)
    new._orig_mod.weight = nn.Parameter(torch.zeros(2, 2))
    torch.testing.assert_close(new(x), new._orig_mod.bias.expand(3, 2))
    torch.testing.assert_close(wrapped(x), expected, rtol=0, atol=0)


# --- copy_tensors ---------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Ties by identity, by storage and by view; a frozen parameter, a buffer, tensors in plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.c = nn.Parameter(self.a.weight.data)
        self.row = nn.Parameter(self.a.weight.data[1], requires_grad=False)
        self.mean: Tensor
        self.register_buffer("mean", torch.arange(3.0))
        self.tables = [self.mean, torch.ones(2, requires_grad=True)]
        self.a.bias.tag = "kept"  # type: ignore[attr-defined]


def test_copied_tensors_keep_ties_views_and_flags() -> None:
    model: Any = Tied()
    model.a.weight.grad = torch.ones(3, 3)
    before = fingerprint(model)
    new: Any = structural_copy(model, copy_tensors=True).root
    assert fingerprint(model) == before
    state, old_state = new.state_dict(keep_vars=True), model.state_dict(keep_vars=True)
    assert list(state) == list(old_state)
    for name, tensor in state.items():
        old = old_state[name]
        assert type(tensor) is type(old) and tensor.requires_grad == old.requires_grad
        assert tensor.stride() == old.stride() and tensor.data_ptr() != old.data_ptr() and tensor.grad is None
        torch.testing.assert_close(tensor, old, rtol=0, atol=0)
    assert new.b.weight is new.a.weight
    assert new.c.data_ptr() == new.a.weight.data_ptr() and new.c is not new.a.weight
    assert new.row.data_ptr() == new.a.weight[1].data_ptr()
    assert new.tables[1].requires_grad and not new.tables[0].requires_grad
    assert new.tables[0] is new.mean and new.tables[1].data_ptr() != model.tables[1].data_ptr()
    assert new.a.bias.tag == "kept"
    with torch.no_grad():
        new.a.weight.zero_()
    assert not new.row.any() and model.row.any()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.empty(2, 3, device="meta"),
        torch.randn(4, 3).t(),
        torch.zeros(0),
        torch.tensor(3),
        torch.randn(3, dtype=torch.bfloat16),
    ],
    ids=["sparse", "conjugate", "meta", "transposed", "empty", "scalar", "bfloat16"],
)
def test_tensors_of_every_make_are_copied(tensor: Tensor) -> None:
    model = nn.Module()
    model.register_buffer("held", tensor)
    held: Any = structural_copy(model, copy_tensors=True).root.held
    assert held is not tensor and type(held) is type(tensor)
    assert (held.dtype, held.shape, held.layout, held.device) == (
        *(tensor.dtype, tensor.shape),
        *(tensor.layout, tensor.device),
    )
    if not tensor.is_meta:
        torch.testing.assert_close(held.resolve_conj(), tensor.resolve_conj(), rtol=0, atol=0)


def test_a_computed_attribute_is_shared_with_a_note() -> None:
    model = Holder()
    model.twice = model.layer.weight * 2
    copied = structural_copy(model, copy_tensors=True)
    assert copied.root.twice is model.twice
    assert copied.notes == ("twice: a tensor computed from others, shared with the given model",)


def test_copied_recurrent_modules_run_on_the_clones() -> None:
    model = nn.GRU(2, 3)
    new: Any = structural_copy(model, copy_tensors=True).root
    assert all(a is b for a, b in zip(new._flat_weights, new.parameters(), strict=True))
    assert [ref() for ref in new._flat_weight_refs] == new._flat_weights
    x = torch.randn(4, 1, 2)
    torch.testing.assert_close(new(x)[0], model(x)[0], rtol=0, atol=0)


# --- parametrized modules without adoption --------------------------------------------------------------------------


def orthogonal(size: int = 3) -> nn.Module:
    return parametrizations.orthogonal(nn.Linear(size, size, dtype=torch.float64))


def test_without_adoption_parametrized_modules_stay_so_and_apart() -> None:
    model: Any = nn.Sequential(orthogonal(), parametrizations.weight_norm(nn.Linear(3, 3, dtype=torch.float64)))
    before = fingerprint(model)
    copied = structural_copy(model, adopt=False)
    new: Any = copied.root
    assert copied.adopted == () and copied.notes == ()
    assert fingerprint(model) == before
    x = torch.randn(2, 3, dtype=torch.float64)
    expected = model(x)
    torch.testing.assert_close(new(x), expected, rtol=0, atol=0)
    assert parametrize.is_parametrized(new[0], "weight") and type(new[0]) is not type(model[0])
    assert parametrize.type_before_parametrizations(new[0]) is nn.Linear
    assert [n for n, _ in new.named_parameters()] == [n for n, _ in model.named_parameters()]

    with parametrize.cached():  # the cache is keyed by module: each must find its own
        model(x)
        new[0].parametrizations.weight.original = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
        assert not torch.equal(new[0].weight, model[0].weight)
    parametrize.remove_parametrizations(new[0], "weight")
    parametrize.remove_parametrizations(new[1], "weight")
    assert type(new[0]) is type(new[1]) is nn.Linear
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_a_model_that_deepcopy_refuses_is_copied() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3)))
    model(torch.randn(2, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    for adopt in (True, False):
        assert structural_copy(model, adopt=adopt).root is not model


def test_deep_models_need_no_deep_stack() -> None:
    model: nn.Module = nn.Identity()
    for _ in range(2000):
        outer = nn.Module()
        outer.__dict__["_modules"]["inner"] = model
        model = outer
    assert len(structural_copy(model).memo) == 2001
