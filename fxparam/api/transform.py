"""``transform``: from a model and a spec to a ``ParametrizedModule``."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxparam.api.exported import export_bodies
from fxparam.api.inputs import Inputs, as_call
from fxparam.declaration import Declaration, Existing
from fxparam.errors import AdoptionError, SpecError
from fxparam.program import Site
from fxparam.runtime.module import ParametrizedModule
from fxparam.runtime.optimizers import repoint, watch_replaced
from fxparam.spec.names import PARAMETRIZATIONS, NamedTensor, join, named_tensors, split
from fxparam.spec.resolve import Task, home_of, latent_owner, nearest, resolve
from fxparam.spec.selectors import Glob
from fxparam.spec.spec import Spec
from fxparam.tracer import peft_class, peft_layers
from fxparam.tracer.adoption import LEGACY_SCHEMES, Adopted
from fxparam.tracer.building import adopted_site, build_site
from fxparam.tracer.copying import structural_copy
from fxparam.tracer.delivery import Binding, install
from fxparam.tracer.looking import present_values
from fxparam.tracer.site import SiteModule, Sites

TRACES = ("auto", "live", "symbolic", "record", "export")
_RECORDED = {"auto": "useful", "record": "everything"}


def transform(
    model: nn.Module,
    spec: Spec | Mapping[Any, Any] | None = None,
    *,
    example_inputs: Inputs | None = None,
    adopt: bool = True,
    copy: bool = False,
    optimizer: Optimizer | None = None,
    trace: str = "auto",
    recompute: bool | str | Sequence[str] = False,
) -> ParametrizedModule:
    """Compute the declared weights of a model once per optimizer step.

    Args:
        model: any module. It is not changed; parameters that no rule touches, and buffers, are shared with it.
        spec: what to compute, and how: a ``Spec`` or a mapping that becomes one. Without it only what the model already
            computes is taken over, and its weight arithmetic hoisted.
        example_inputs: inputs of the model, a tuple of positional or a mapping of keyword ones: for ``fold`` and the exporters,
            and to record the model now instead of at its first call (in the mode it is in, and without a trace of it).
        adopt: also take over ``torch.nn.utils.parametrize``, the legacy ``weight_norm`` and ``spectral_norm``, pruning, and the
            LoRA layers of ``peft`` (their ``merged_weight``, where they have no dropout).
        copy: share no tensor with the given model.
        optimizer: an optimizer of the given model's parameters, pointed at the latents instead.
        trace: ``"auto"``: a graph of the body where symbolic tracing is exact; else live Python that is recorded at its first
            call, and graphs in place of those modules whose weight arithmetic can be moved out; ``"record"``: graphs in place
            of all modules that can be recorded; ``"live"``: never a graph; ``"symbolic"``: a graph, or an error that says why
            not; ``"export"``: a graph by ``torch.export`` for calls like ``example_inputs``, or an error.
        recompute: weights that keep nothing for their backward between forward and backward, and are computed again in it:
            all (True), or those whose name fits a glob or one of several. For maps that keep many times the size of the
            weight (iterations); costs one more evaluation per backward. What has a state or draws random numbers is kept.

    Raises:
        SpecError: the spec does not fit the model.
        AdoptionError: a rule is for a weight that the model computes already in a way that cannot be taken over.
        TraceError: ``trace="symbolic"`` or ``"export"``, and the model cannot be traced exactly.
    """
    if not isinstance(model, nn.Module):
        raise SpecError(f"got {type(model).__name__}, expected an nn.Module")
    if not isinstance(spec, Mapping | None):
        raise SpecError(f"got {spec!r} as a spec, expected a mapping such as {{'layer.weight': fxp.orthogonal()}}")
    if isinstance(model, ParametrizedModule):
        raise SpecError("the model is transformed already; give all rules to one transform, or start from fxp.restore(model)")
    if inner := next((path for path, module in model.named_modules() if isinstance(module, ParametrizedModule)), None):
        raise SpecError(
            f"{inner} is transformed already; transform the whole model at once: put fxp.restore of it in its place first"
        )
    if copy and optimizer is not None:
        raise SpecError(
            "copy=True shares no tensor with the given model, so there is nothing in its optimizer to point elsewhere; build "
            "an optimizer from the parameters of what transform returns"
        )
    if trace not in TRACES:
        raise SpecError(f"got trace={trace!r}, expected one of {', '.join(map(repr, TRACES))}")
    copied = structural_copy(model, adopt=adopt, copy_tensors=copy)
    builder = _Builder(copied.root, spec if isinstance(spec, Spec) else Spec(spec), copied.adopted)
    _check_rules(builder.spec, copied.notes)
    builder.build()
    notes = (*copied.notes, *(builder.build_lora(shared=not copy) if adopt else ()))
    sites = tuple(builder.sites)
    result = ParametrizedModule(
        copied.root,
        sites,
        trace=trace in ("auto", "symbolic"),
        record=_RECORDED.get(trace, "nothing"),
        why_live="" if trace in ("auto", "symbolic") else f'transform(..., trace="{trace}") asked for it',
        legacy=builder.legacy,
        example_inputs=example_inputs,
        recompute=_recomputed(recompute, sites),
    )
    result._fxp_options["notes"] = notes
    if trace == "symbolic":
        _ = result.graph
    if trace == "export":
        export_bodies(result, as_call(_needed(example_inputs)))
    elif example_inputs is not None:
        result._fxp_runtime.regions.record_ahead(*as_call(example_inputs))
    replaced = builder.replaced
    if optimizer is not None:
        repoint(optimizer, replaced)
    watch_replaced(result, replaced)
    return result


def _check_rules(spec: Spec, notes: Sequence[str]) -> None:
    """A rule for a weight that is computed already and could not be taken over would be lost.

    Raises:
        AdoptionError: there is one.
    """
    for name, _, reason in (note.partition(": ") for note in notes):
        for rule in spec:
            if isinstance(rule, Glob) and fnmatch.fnmatchcase(name, rule.pattern):
                raise AdoptionError(f"rule {rule}: {name} {reason}; or transform(..., adopt=False) without a rule for it")


def _needed(inputs: Inputs | None) -> Inputs:
    if inputs is None:
        raise SpecError('trace="export" needs inputs of the model; type transform(..., example_inputs=(x, ...))')
    return inputs


def _recomputed(patterns: bool | str | Sequence[str], sites: Sequence[Site]) -> frozenset[str]:
    """The names of the computed weights that fit ``recompute``.

    Raises:
        SpecError: a pattern fits none.
    """
    names = [name for site in sites for aliases in site.aliases for name in aliases]
    if isinstance(patterns, bool):
        return frozenset(names if patterns else ())
    found: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        fitting = fnmatch.filter(names, pattern)
        if not fitting:
            raise SpecError(f"recompute={pattern!r} fits no computed weight; {nearest(pattern, names)}")
        found.update(fitting)
    return frozenset(found)


class _Builder:
    """Turns the tasks of a spec, and what was adopted, into sites on the live tree."""

    def __init__(self, root: nn.Module, spec: Spec, adopted: Sequence[Adopted]) -> None:
        self.root, self.spec = root, spec
        self.paths = {id(module): path for path, module in reversed(list(root.named_modules(remove_duplicate=False)))}
        self.adopted = {(id(one.owner), one.tensor_name): one for one in adopted}
        self.computed = {key: self._present(one) for key, one in self.adopted.items()}
        self.rows = named_tensors(root, self.computed)
        self.row_of = {alias: row for row in self.rows for alias in row.aliases}
        self.legacy: dict[str, str] = {}
        self.replaced: list[tuple[Tensor, tuple[Tensor, ...], str]] = []
        self.values: dict[str, Tensor] = {}
        self.sites: list[Site] = []
        self.bindings: dict[int, tuple[nn.Module, Binding]] = {}

    def build(self) -> tuple[Site, ...]:
        """Build and install every site; returns them, each after those it reads."""
        modules = {key: adopted_site(one) for key, one in self.adopted.items()}
        latents = [row for key, module in modules.items() for row in self._latent_rows(key, module)]
        tasks = resolve(self.spec, (*self.rows, *latents))
        inner = [task for task in tasks if any(row.is_latent for row in task.rows)]
        self.row_of |= {row.name: row for row in latents}
        extended = {row.name for task in tasks for row in task.rows if not row.is_latent}
        for (owner, local), one in self.adopted.items():
            name = join(self.paths[owner], local)
            row = self.row_of[name]
            self.legacy |= {join(self.paths[owner], old): join(self.paths[owner], new) for old, new in one.legacy_names.items()}
            module = modules[owner, local]
            own = [task for task in inner if any(place[0] is module for row in task.rows for place in row.places)]
            if row.name not in extended:
                self._place(*split(row.name), module)
                if own and one.inner:
                    raise SpecError(
                        f"{row.name} has latents that are computed already; a rule for another one is not supported"
                    )
                reads = self._adopt_latents(one, module, home_of(self.paths[owner], local))
                reads += tuple(self._build_latent(task, module) for task in own)
                self._add((row,), module, "adopted", one.origin, "as it was", reads)
            elif own or one.inner:
                other = "replaced by another" if own else "computed already"
                raise SpecError(f"{row.name} is extended by one rule, and its latent {other}; give one of them")
        for number, task in enumerate(tasks):
            if task not in inner:
                self._build(task, number)
        for holder, binding in self.bindings.values():
            install(holder, binding)
        return tuple(self.sites)

    def build_lora(self, *, shared: bool) -> tuple[str, ...]:
        """Build the sites of LoRA layers, which read what all others compute; returns notes on those left as they are."""
        layers, notes = peft_layers.take_over(self.root, self._known, shared=shared)
        for one in layers:
            names = [tuple(join(path, local) for path in one.paths) for local in one.weights]
            reads = tuple(self._canonical(name) for name in one.reads)
            values = present_values(one.module, [self._value(name) for name in reads])
            rows = [NamedTensor(alias[0], alias, (), value, False) for alias, value in zip(names, values, strict=True)]
            self._add(rows, one.module, one.declaration, peft_layers.ORIGIN, "as it was", reads)
            peft_class.bind(one.layer, {local: row.name for local, row in zip(one.weights, rows, strict=True)})
        return notes

    def _legacy_names(self, name: str, module: SiteModule) -> dict[str, str]:
        """The names that a checkpoint of a legacy hook has for the tensors of a site that does the same."""
        own = set(module.state_dict())
        path, local = split(name)
        for scheme in LEGACY_SCHEMES:
            if own == set(scheme.values()):
                return {join(path, f"{local}{old}"): join(home_of(path, local), new) for old, new in scheme.items()}
        return {}

    def _latent_rows(self, key: tuple[int, str], module: SiteModule) -> Iterator[NamedTensor]:
        """The latents of what was adopted, as tensors that a rule may name by spelling out ``parametrizations``."""
        home = home_of(self.paths[key[0]], key[1])
        for local, tensor in zip(module.latent_names, module.latents, strict=True):
            name = join(home, local)
            yield NamedTensor(name, (name,), ((module, local),), tensor, not isinstance(tensor, nn.Parameter))

    def _adopt_latents(self, one: Adopted, module: SiteModule, home: str) -> tuple[str, ...]:
        """The sites of latents that are computed already; returns their names, which the site they belong to reads."""
        for local, inner in one.inner.items():
            latent, name = adopted_site(inner), join(home, local)
            row = NamedTensor(name, (name,), ((module, local),), getattr(module, local), inner.is_buffer)
            self._place(home, local, latent)
            reads = self._adopt_latents(inner, latent, home_of(home, local))
            self._add((row,), latent, "adopted", inner.origin, "as it was", reads)
            module.computed_latents += (local,)
        return tuple(join(home, local) for local in one.inner)

    def _build_latent(self, task: Task, module: SiteModule) -> str:
        """The site of a latent; returns its name, which the site it belongs to reads."""
        if task.joint or task.reads:
            raise SpecError(f"rule {task.rule}: a latent can only be computed by itself, without joint(...) and ref(...)")
        self._build(task, 0)
        module.computed_latents += (split(task.rows[0].name)[1],)
        return task.rows[0].name

    def _build(self, task: Task, number: int) -> None:
        reads = tuple(self._canonical(target) for target in task.reads)
        one = next((self.adopted[key] for row in task.rows for key in self._keys(row) if key in self.adopted), None)
        module, start = build_site(task, [self._value(name) for name in reads], one)
        declared = " >> ".join(map(_text, task.steps))
        self._add(task.rows, module, declared, "spec", start, reads, joint=number if task.joint else None)
        if not task.joint:
            self.legacy |= self._legacy_names(task.rows[0].name, module)
        home, behind = self.sites[-1].home, tuple(module.parameters())
        if one is None:
            self.replaced += [(row.tensor, behind, home) for row in task.rows if isinstance(row.tensor, nn.Parameter)]
        else:
            # What extends it may have parameters of its own, which an optimizer of its latents has to train as well.
            self.replaced += [(latent, behind, home) for latent in module.latents[:1] if isinstance(latent, nn.Parameter)]

    def _add(
        self,
        rows: Sequence[NamedTensor],
        module: SiteModule,
        declared: str,
        origin: str,
        start: str,
        reads: tuple[str, ...],
        joint: int | None = None,
    ) -> None:
        # Below the owner of its first weight: a container at the root would run another child of its own.
        path, local = split(rows[0].name)
        local = local if joint is None else f"joint{joint}"
        home = home_of(path, local)
        module.train(self.root.training)
        values = present_values(module, [self._value(name) for name in reads])
        for row, value in zip(rows, values, strict=True):
            self.values |= dict.fromkeys(row.aliases, value)
            for owner, name in row.places:
                alone = joint is None and len(reads) == len(module.computed_latents)
                self._bind(owner, name, row, home if alone else None)
        self._place(path, local, module)
        self.sites.append(
            Site(
                names=tuple(row.name for row in rows),
                aliases=tuple(row.aliases for row in rows),
                home=home,
                latents=tuple(join(home, name) for name in module.latent_names if name not in module.computed_latents),
                reads=reads,
                declaration=declared,
                origin=origin,
                start=start,
            )
        )

    def _place(self, path: str, local: str, module: SiteModule) -> None:
        """Put a site below the owner of its weight."""
        holder = self.root.get_submodule(path)._modules.setdefault(PARAMETRIZATIONS, Sites())
        if not isinstance(holder, Sites):
            raise SpecError(
                f"{path or 'the model'} has a child named {PARAMETRIZATIONS!r}, where its computed weights would live; "
                "rename it"
            )
        holder.add_module(local, module)

    def _bind(self, owner: nn.Module, local: str, row: NamedTensor, home: str | None) -> None:
        if id(owner) not in self.bindings:
            order = {"parameters": self._order(owner), "buffers": tuple(owner._buffers)}
            self.bindings[id(owner)] = (owner, Binding({}, {}, order))
        binding = self.bindings[id(owner)][1]
        binding.names[local] = row.name
        path, site_local = split(row.name)
        if home is not None and self.root.get_submodule(path) is owner:
            binding.homes[local] = (site_local, 0)

    def _order(self, owner: nn.Module) -> tuple[str, ...]:
        """The names of an owner's parameters; PyTorch forgot the place of those it computes: weights come before biases."""
        if isinstance(owner, nn.RNNBase):
            return tuple(owner._flat_weights_names)
        computed = [local for key, local in self.adopted if key == id(owner) and local not in owner._parameters]
        first = [local for local in computed if "bias" not in local]
        return (*first, *owner._parameters, *(local for local in computed if local not in first))

    def _keys(self, row: NamedTensor) -> list[tuple[int, str]]:
        return [(id(owner), local) for owner, local in row.places]

    def _canonical(self, target: str) -> str:
        """The first name of a weight, or the full name of a latent (``"x.original"`` -> ``"x's home.original"``)."""
        if target in self.row_of:
            return self.row_of[target].name
        weight = self.row_of[latent_owner(target, self.row_of) or ""].name
        site = next((site for site in self.sites if weight in site.names), None)
        _, local = split(target)
        if site is None or join(site.home, local) not in site.latents:
            raise SpecError(f"ref({target!r}): {weight} has no latent {local!r}")
        return join(site.home, local)

    def _known(self, name: str) -> Tensor | None:
        return self._value(self.row_of[name].name) if name in self.row_of else None

    def _value(self, name: str) -> Tensor:
        if name in self.values:
            return self.values[name]
        if name in self.row_of:
            return self.row_of[name].tensor.detach()
        path, local = split(name)
        return getattr(self.root.get_submodule(path), local).detach()

    @torch.no_grad()
    def _present(self, one: Adopted) -> Tensor:
        like = one.originals[0]
        value = present_values(adopted_site(one), ())[0]
        # Two adopted weights are tied if their latents are: the value stands for identity here.
        return nn.Parameter(value, requires_grad=like.requires_grad) if not one.is_buffer else value


def _text(step: Declaration) -> str:
    return "existing" if isinstance(step, Existing) else repr(step)
