"""References between modules, in whatever container, closure or hook, lead to the copies."""

from __future__ import annotations

import collections
import dataclasses
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from copying.common import Holder, fingerprint
from torch import Tensor, nn

from fxparam.tracer.copying import structural_copy


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
