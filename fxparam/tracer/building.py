"""From a declaration to the maps and latents of one site.

A chain ``a >> b`` is built backwards: ``b`` for the weight itself, ``a`` for what ``b`` would have to be given. So each map is
built for the shape it will produce, and the latents start where the weight is kept, if it is in the image.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxparam.catalogue.joint import JointEntry
from fxparam.declaration import Custom, Declaration, Entry, Existing, Place, Ref, check_resample, steps_of
from fxparam.errors import ImageError, SpecError
from fxparam.spec.resolve import Task
from fxparam.tracer.adoption import Adopted
from fxparam.tracer.looking import looking, present_values
from fxparam.tracer.site import SiteModule, invert

Value = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Start:
    """What a map should yield at the start, and how that came about.

    Attributes:
        value: the tensor (several for a joint map).
        notes: for the report: what kept the weight from being its own start.
    """

    value: Value
    notes: tuple[str, ...] = ()


class FunctionMap(nn.Module):
    """A user's plain function as a map.

    Args:
        function: latents -> weight.
        inverse: weight -> latents, if the user gave one.
    """

    def __init__(self, function: Callable[..., Any], inverse: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.function = function
        if inverse is not None:
            self.right_inverse = inverse

    def forward(self, *latents: Tensor) -> Any:
        """The weight from its latents."""
        return self.function(*latents)

    def extra_repr(self) -> str:
        """The function's name."""
        return getattr(self.function, "__qualname__", repr(self.function))


@torch.no_grad()
def build_site(task: Task, reads: Sequence[Tensor], adopted: Adopted | None) -> tuple[SiteModule, str]:
    """The site of a task, and how its latents got their start (for the report).

    Args:
        task: the weights and the declaration.
        reads: the present values of the weights it refers to.
        adopted: what computes the weight already, where the declaration extends that.

    Raises:
        SpecError: the declaration does not fit the weight; names the weight and the rule.
    """
    names = ", ".join(row.name for row in task.rows[:3]) + (", ..." if len(task.rows) > 3 else "")
    try:
        return _build(task, reads, adopted)
    except (SpecError, ImageError) as error:
        raise SpecError(f"{names} (rule {task.rule}): {error}") from error


def adopted_site(adopted: Adopted) -> SiteModule:
    """The site of a weight that was computed already: its maps and latents as they are."""
    latents = adopted.originals if len(adopted.originals) > 1 else adopted.originals[0]
    try:
        return SiteModule(adopted.steps, latents, is_buffer=adopted.is_buffer)
    except SpecError as error:
        raise SpecError(f"{adopted.tensor_name} of {type(adopted.owner).__name__}: {error}") from error


def _build(task: Task, reads: Sequence[Tensor], adopted: Adopted | None) -> tuple[SiteModule, str]:
    weights = tuple(row.tensor.detach() for row in task.rows)
    target: Value = weights if task.joint else weights[0]
    first, rest = task.steps[0], task.steps
    if isinstance(first, Ref | Existing):
        rest = task.steps[1:]
    declared, steps, start = _backwards(task, rest, reads, Start(target))
    resample = [_resampling(one, module) for one, module in zip(declared, steps, strict=True)]
    later = isinstance(first, Ref | Existing)
    _check_rebasing(steps if later else steps[1:])
    given: Value = tuple(reads) if isinstance(first, Ref) else target if later else start.value
    _check_latents(declared, steps, given if later else None)
    _settle(declared, steps, given, from_first=later)
    is_buffer = all(row.is_buffer for row in task.rows)
    if isinstance(first, Ref):
        site = SiteModule(steps, None, n_weights=len(weights), resample=resample)
        notes: tuple[str, ...] = (f"computed from {', '.join(first.targets)}",)
    elif isinstance(first, Existing) and adopted is not None:
        existing = adopted_site(adopted)
        latents = existing.latents if len(existing.latents) > 1 else existing.latents[0]
        site = SiteModule([*existing, *steps], latents, is_buffer=is_buffer, resample=[*existing.resample, *resample])
        notes = ("latents as they were",)
    else:
        trainable = any(row.tensor.requires_grad for row in task.rows) or any(getattr(s, "adapts", None) is True for s in steps)
        if is_buffer or not trainable:
            _freeze(rest, steps)
        elif task.joint:
            _check_frozen(task)
        site = SiteModule(
            steps,
            _as_latents(start.value, trainable, is_buffer),
            n_weights=len(weights),
            is_buffer=is_buffer,
            resample=resample,
        )
        notes = start.notes
    return site, _check(site, reads, target, notes)


def _backwards(
    task: Task, rest: Sequence[Declaration], reads: Sequence[Tensor], start: Start
) -> tuple[list[Declaration], list[nn.Module], Start]:
    """The steps as they are for this place, their modules, and what the first of them has to be given to yield the weight."""
    init = _init_of(rest)
    place = Place(tuple(row.name for row in task.rows), tuple(row.places[0][0] for row in task.rows))
    after_ref = isinstance(task.steps[0], Ref)
    declared: list[Declaration] = []
    steps: list[nn.Module] = []
    for position, step in reversed(list(enumerate(rest))):
        for inner in reversed(_placed(step, place, start)):
            if position == 0 and after_ref:
                module = _from_reads(inner, reads, start) if len(rest) == 1 else _map(inner, start.value, None, task.joint)[0]
            elif position > 0 and isinstance(inner, Entry) and inner.follows:
                module = _map(inner, start.value, None, task.joint)[0]
            else:
                module, start = _step(inner, start, init if position == 0 else None, task.joint)
            declared.insert(0, inner)
            steps.insert(0, module)
    return declared, steps, start


def _settle(declared: Sequence[Declaration], steps: Sequence[nn.Module], value: Value, *, from_first: bool) -> None:
    """Fit each map to what it is given at the start; the first was built for it, unless others come before."""
    fitted = [isinstance(one, Entry) and type(one).settle is not Entry.settle for one in declared]
    for at, (one, module) in enumerate(zip(declared, steps, strict=True)):
        if not any(fitted[at:]):
            return
        if fitted[at] and (at or from_first) and isinstance(one, Entry):
            one.settle(module, *_tuple(value))
        with looking(module, evaluate=True):
            value = module(*_tuple(value))


def _check_latents(declared: Sequence[Declaration], steps: Sequence[nn.Module], given: Value | None) -> None:
    """Refuse a map of several latents where it is given a single value: behind another map, a ref or existing()."""
    for at, (one, module) in enumerate(zip(declared, steps, strict=True)):
        count = len(_tuple(given)) if at == 0 and given is not None else 1
        takes = _arity(module)
        if (at or given is not None) and takes is not None and takes > count:
            raise SpecError(
                f"{one!r} has {takes} latents and is given {count} of them here; put it first in its chain, to have its own"
            )


def _arity(module: nn.Module) -> int | None:
    """How many positional arguments a map needs; None: any number."""
    parameters = inspect.signature(module.forward).parameters.values()
    if any(one.kind is one.VAR_POSITIONAL for one in parameters):
        return None
    return sum(one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) and one.default is one.empty for one in parameters)


def _resampling(step: Declaration, module: nn.Module) -> str | None:
    """What a rule says about how often a map of it draws random numbers; None: nothing."""
    if isinstance(step, Custom) and step.resample is not None:
        return step.resample
    own = getattr(module, "resample", None)
    if isinstance(own, str):
        check_resample(type(module).__name__, own)
    return None


def _placed(step: Declaration, place: Place, wanted: Start) -> tuple[Declaration, ...]:
    """A step as it is for this place."""
    if not isinstance(step, Entry):
        return (step,)
    shape = tuple(wanted.value.shape) if isinstance(wanted.value, Tensor) else ()
    return steps_of(step.placed(replace(place, shape=shape)))


def _freeze(declared: Sequence[Declaration], steps: Sequence[nn.Module]) -> None:
    """What computes a frozen weight is frozen, too; modules of the user's own are left as they are."""
    own = {id(step.map) for step in declared if isinstance(step, Custom)}
    for step in steps:
        if id(step) not in own:
            step.requires_grad_(False)


def _check_frozen(task: Task) -> None:
    """Refuse to train frozen weights along with others."""
    frozen = [row.name for row in task.rows if not row.tensor.requires_grad]
    if frozen:
        raise SpecError(
            f"{len(frozen)} of {len(task.rows)} weights are frozen ({', '.join(frozen[:3])}) and would be trained with the "
            "others; select those that train, or freeze all"
        )


def _check_rebasing(later: Sequence[nn.Module]) -> None:
    """Only the map that is given the latents can move them into its base."""
    for module in later:
        if isinstance(getattr(module, "rebase_every", None), int) and hasattr(module, "rebase"):
            raise SpecError(
                f"{_name(module)} changes its base, for which it has to be given the latents; put it first in its chain, or "
                "leave out rebase_every="
            )


def _init_of(steps: Sequence[Declaration]) -> Any:
    for step in steps[1:]:
        if isinstance(step, Custom) and step.init is not None:
            raise SpecError(f"{step!r} gives a start but is not first in its chain; the start is that of the first map")
    first = steps[0] if steps else None
    return first.init if isinstance(first, Custom) else None


def _step(step: Declaration, wanted: Start, init: Any, joint: bool) -> tuple[nn.Module, Start]:
    """The module of one step, and what it has to be given to yield ``wanted``."""
    latents = init(wanted.value) if callable(init) and not isinstance(init, Tensor) else init
    module, plain = _map(step, wanted.value, latents, joint)
    if latents is not None:
        value = tuple(latents) if isinstance(latents, tuple | list) else latents
        return module, Start(value, (*wanted.notes, "start given by init="))
    if not hasattr(module, "right_inverse"):
        _check_shape_kept(module, wanted.value, plain)
        return module, Start(
            wanted.value, (*wanted.notes, f"{_name(module)} has no right inverse: its latent starts at the weight")
        )
    try:
        return module, Start(invert(module, wanted.value, project=False), wanted.notes)
    except ImageError as error:
        start = getattr(module, "start", None)
        value = invert(module, wanted.value, project=True) if start is None else start(wanted.value)
        return module, Start(value, (*wanted.notes, f"not in the image of {_name(module)}{_by_how_far(error)}: starts nearby"))
    except Exception as error:
        # Maps written for other libraries raise errors of their own; GeoTorch's classes offer a sampled start instead.
        sample = getattr(module, "sample", None)
        if sample is None:
            raise SpecError(
                f"{_name(module)}.right_inverse raised {type(error).__name__}: {error}; give a start with "
                "fxp.custom(..., init=...)"
            ) from error
        value = invert(module, sample(), project=False)
        return module, Start(value, (*wanted.notes, f"sampled: right_inverse raised {type(error).__name__}"))


def _map(step: Declaration, value: Value, latents: Any, joint: bool) -> tuple[nn.Module, bool]:
    """The module of one step and whether it wraps a plain function."""
    if isinstance(step, Entry) and isinstance(value, tuple) and not joint:
        raise SpecError(f"{step!r} comes before a map of {len(value)} latents, which can only be the first of its chain")
    if isinstance(step, JointEntry):
        return (step.build_joint(value) if joint else step.build(value)), False  # type: ignore[arg-type]
    if isinstance(step, Entry):
        if joint:
            raise SpecError(
                f"{step!r} yields one weight; for joint(...) use fxp.subspace, fxp.flat or a map that returns a tuple"
            )
        return step.build(value), False  # type: ignore[arg-type]
    if not isinstance(step, Custom):
        raise SpecError(f"{step!r} cannot stand here")
    if isinstance(step.map, nn.Module):
        return step.map, False
    given = latents if latents is not None else value
    probe = [t.detach().clone() for t in (given if isinstance(given, tuple | list) else (given,))]
    try:
        result = step.map(*probe)
    except Exception as error:
        raise SpecError(
            f"{step!r} raised {type(error).__name__}: {error}; it was called with {_shapes(tuple(probe))}. A function of "
            "several latents, or of another shape, needs fxp.custom(function, init=...)"
        ) from error
    if isinstance(result, nn.Module):
        return (step.map(*_tuple(value)) if latents is not None else result), False
    return FunctionMap(step.map, step.right_inverse), True


def _from_reads(step: Declaration, reads: Sequence[Tensor], wanted: Start) -> nn.Module:
    """The first map after a ref: built for the weight it produces; a factory is given the weight, a function the reads."""
    if isinstance(step, Custom) and not isinstance(step.map, nn.Module):
        if step.init is not None:
            raise SpecError(f"{step!r} gives a start, but after fxp.ref(...) there is no latent to start")
        try:
            result = step.map(*(read.detach().clone() for read in reads))
        except Exception as error:
            raise SpecError(
                f"{step!r} raised {type(error).__name__}: {error}; it was called with {_shapes(tuple(reads))}"
            ) from error
        return result if isinstance(result, nn.Module) else FunctionMap(step.map, step.right_inverse)
    return _map(step, wanted.value, None, False)[0]


def _as_latents(value: Value, trainable: bool, is_buffer: bool) -> Value:
    """Fresh leaves: nothing of the given model is shared with them."""

    def leaf(tensor: Tensor) -> Tensor:
        fresh = tensor.detach().clone(memory_format=torch.contiguous_format)
        grad = trainable and (fresh.is_floating_point() or fresh.is_complex())
        return fresh if is_buffer else nn.Parameter(fresh, requires_grad=grad)

    return tuple(map(leaf, value)) if isinstance(value, tuple) else leaf(value)


def _check(site: SiteModule, reads: Sequence[Tensor], target: Value, notes: Sequence[str]) -> str:
    """Compare what the site yields now with the weight it replaces; returns the line for the report."""
    got, want = present_values(site, reads), _tuple(target)
    if len(got) != len(want) or not all(isinstance(t, Tensor) for t in got):
        raise SpecError(f"the declaration yields {len(got)} values for {len(want)} weights")
    for new, old in zip(got, want, strict=True):
        if new.shape != old.shape or new.dtype != old.dtype or new.device != old.device:
            raise SpecError(
                f"the declaration yields {_describe(new)}, the weight is {_describe(old)}; give a start of the right shape "
                "with fxp.custom(..., init=...) or mend the map"
            )
    lost = [label for label, values in (("latents", site.latents), ("weight", got)) if not all(map(_finite, values))]
    if lost and all(map(_finite, want)):
        raise SpecError(f"the {lost[0]} would start at NaN or infinity; give another start with fxp.custom(..., init=...)")
    moved = max((_distance(new, old) for new, old in zip(got, want, strict=True)), default=0.0)
    eps = max(torch.finfo(old.dtype).eps if old.is_floating_point() or old.is_complex() else 0.0 for old in want)
    kept = "weight kept" if moved <= 100 * eps else f"weight moved by {moved:.2g} of its norm"
    return "; ".join([kept, *notes])


def _distance(new: Tensor, old: Tensor) -> float:
    if not (old.is_floating_point() or old.is_complex()):
        return float(not torch.equal(new, old))
    scale = float(torch.linalg.vector_norm(old.to(torch.promote_types(old.dtype, torch.float32))))
    change = float(torch.linalg.vector_norm((new - old).to(torch.promote_types(old.dtype, torch.float32))))
    return change / scale if scale else change


def _by_how_far(error: ImageError) -> str:
    _, found, far = str(error).partition("is missed by ")
    return f" by {far.split(',')[0]}" if found else ""


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _check_shape_kept(module: nn.Module, value: Value, plain: bool) -> None:
    try:
        result = module(*_tuple(value))
    except Exception as error:
        raise SpecError(
            f"{_name(module)} raised {type(error).__name__}: {error}; give its start with fxp.custom(..., init=...)"
        ) from error
    if _shapes(_tuple(result)) != _shapes(_tuple(value)):
        raise SpecError(
            f"{_name(module)} turns {_shapes(_tuple(value))} into {_shapes(_tuple(result))} and has no right inverse; "
            "give the start of its latent with fxp.custom(..., init=...)"
        )


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _shapes(values: tuple[Any, ...]) -> str:
    return ", ".join(_describe(value) if isinstance(value, Tensor) else type(value).__name__ for value in values)


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def _name(module: nn.Module) -> str:
    return module.extra_repr() if isinstance(module, FunctionMap) else type(module).__name__
