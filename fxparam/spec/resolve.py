"""What a spec means for one model: which weights each rule computes, and in which order.

Weights that read each other form a directed graph (networkx); its topological order is the order of computation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from torch.nn.parameter import is_lazy

from fxparam.declaration import Declaration, Existing, Ref, steps_of
from fxparam.errors import SpecError
from fxparam.spec.names import PARAMETRIZATIONS, NamedTensor, join, split
from fxparam.spec.selectors import Joint, Selector, Where
from fxparam.spec.spec import Spec


@dataclass(frozen=True, eq=False)
class Task:
    """One declaration for one weight, or for several that it yields together.

    Attributes:
        rows: the weights, in registration order.
        steps: the declaration, first step first.
        rule: the selector, for messages.
        joint: whether the weights are yielded together.
    """

    rows: tuple[NamedTensor, ...]
    steps: tuple[Declaration, ...]
    rule: Selector
    joint: bool

    @property
    def reads(self) -> tuple[str, ...]:
        """The names that the first step refers to."""
        first = self.steps[0]
        return first.targets if isinstance(first, Ref) else ()


def resolve(spec: Spec, rows: Sequence[NamedTensor]) -> tuple[Task, ...]:
    """The tasks of a spec for a model with these tensors, each after those it reads.

    Raises:
        SpecError: a selector matches nothing, two rules meet on one weight, a reference leads nowhere or in a circle, a
            weight is computed already, or a parameter has no shape yet.
    """
    tasks: list[Task] = []
    taken: dict[str, Selector] = {}
    for rule, declaration in spec.items():
        matched = _matched(rule, rows)
        for row in matched:
            if row.name in taken:
                raise SpecError(
                    f"two rules for {row.name}: {taken[row.name]} and {rule}; make one narrower or join the "
                    "declarations with >>"
                )
            taken[row.name] = rule
            _check(row, rule, declaration)
        steps = steps_of(declaration)
        groups = [matched] if isinstance(rule, Joint) else [(row,) for row in matched]
        tasks += [Task(group, steps, rule, isinstance(rule, Joint)) for group in groups]
    return _in_order(tasks, rows)


def nearest(name: str, names: Iterable[str]) -> str:
    """The hint of an error about an unknown name."""
    names = list(names)
    by_word = {_words(candidate): candidate for candidate in reversed(names)}
    near = get_close_matches(_words(name), by_word, 3, 0.4)
    if near:
        return f"nearest: {', '.join(by_word[word] for word in near)}"
    return f"there are {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "the model has no tensors"


def _words(name: str) -> str:
    """A name or pattern without what does not help to compare: case, quotes, wildcards, escapes."""
    return re.sub(r"[^a-z0-9_.]|re\.compile", "", name.lower())


def _matched(rule: Selector, rows: Sequence[NamedTensor]) -> tuple[NamedTensor, ...]:
    visible = [row for row in rows if rule.reaches_latents or not row.is_latent]
    found = [row for row in visible if rule.matches(row)]
    found = [row for row in found if not row.is_buffer] or found
    if (
        not found
        and isinstance(rule, Where)
        and not any(isinstance(owner, rule.module_type) for row in visible for owner, _ in row.places)
    ):
        raise SpecError(f"rule {rule} matches nothing; the model has no {rule.module_type.__name__} with parameters or buffers")
    if not found:
        names = [name for row in visible for name in row.aliases]
        raise SpecError(f"rule {rule} matches nothing; {nearest(str(rule), names)}")
    return tuple(found)


def _check(row: NamedTensor, rule: Selector, declaration: Declaration) -> None:
    if is_lazy(row.tensor):
        raise SpecError(f"{row.name} is lazy and has no shape yet; run the model once on an input, then transform it")
    if row.tensor.is_meta:
        raise SpecError(
            f"{row.name} is on the meta device and has no values; type model.to_empty(device=...), load or initialize its "
            "weights, then transform it"
        )
    extends = isinstance(steps_of(declaration)[0], Existing)
    if row.computed and not extends:
        raise SpecError(
            f"{row.name} is already parametrized and rule {rule} would replace that; type fxp.existing() >> {declaration!r} "
            "to extend it, or remove the parametrization first"
        )
    if extends and not row.computed:
        raise SpecError(f"rule {rule} extends what computes {row.name}, but nothing does; leave out fxp.existing()")


def latent_owner(target: str, weights: Iterable[str]) -> str | None:
    """The weight whose latent ``target`` names (``"layer.weight.original0"``), or None."""
    path, local = split(target)
    named = local == "original" or local.removeprefix("original").isdigit()
    return path if named and path in set(weights) else None


def _in_order(tasks: list[Task], rows: Sequence[NamedTensor]) -> tuple[Task, ...]:
    names = {alias: row.name for row in rows for alias in row.aliases}
    maker = {row.name: task for task in tasks for row in task.rows}
    import networkx as nx

    graph: nx.DiGraph = nx.DiGraph()
    graph.add_nodes_from(range(len(tasks)))
    index = {id(task): number for number, task in enumerate(tasks)}
    for task in tasks:
        for target in task.reads:
            weight = names.get(target) or names.get(latent_owner(target, names) or "")
            if weight is None:
                raise SpecError(f"rule {task.rule}: ref({target!r}) names no tensor; {nearest(target, names)}")
            if weight in maker:
                graph.add_edge(index[id(maker[weight])], index[id(task)])
    try:
        cycle = nx.find_cycle(graph)
    except nx.NetworkXNoCycle:
        order = nx.lexicographical_topological_sort(graph)
        return tuple(tasks[number] for number in order)
    # Told in the direction of reading: each weight reads the next.
    path = [tasks[source].rows[0].name for source, _ in reversed(cycle)]
    raise SpecError(f"weights read each other in a circle: {' -> '.join([*path, path[0]])}; break it with a latent of its own")


def home_of(path: str, local: str) -> str:
    """The dotted name of the module that keeps the latents of a weight."""
    return join(path, f"{PARAMETRIZATIONS}.{local}")
