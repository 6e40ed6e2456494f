"""``Spec``: the ordered, immutable mapping from selectors to declarations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fxparam.declaration import Declaration, Existing, Ref, declaration, steps_of
from fxparam.errors import SpecError
from fxparam.spec import files
from fxparam.spec.selectors import Selector, selector


class Spec(Mapping[Selector, Declaration]):
    """What to compute, and how.

    ``Spec({"rnn.weight_hh_l*": fxp.orthogonal()})``. Keys are selectors, values are declarations; see
    ``fxparam.spec.selectors.selector`` and ``fxparam.declaration.declaration`` for the forms they take.

    Raises:
        SpecError: a key or value is none of these forms, or ``ref``/``existing`` stands anywhere but first in a chain.
    """

    def __init__(self, rules: Mapping[Any, Any] | None = None) -> None:
        converted: dict[Selector, Declaration] = {}
        for key, value in (rules or {}).items():
            rule = selector(key)
            if rule in converted:
                raise SpecError(f"two rules have the same selector {rule}; join their declarations with >>")
            converted[rule] = _checked(rule, declaration(value))
        self._rules = converted

    def __getitem__(self, key: object) -> Declaration:
        return self._rules[selector(key)]

    def __iter__(self) -> Iterator[Selector]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)

    def __hash__(self) -> int:
        return hash(tuple(self._rules))

    def __repr__(self) -> str:
        body = "".join(f"    {key}: {value!r},\n" for key, value in self._rules.items())
        return f"Spec({{\n{body}}})" if body else "Spec({})"

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain values (strings, numbers, lists, dicts), for YAML or JSON.

        Raises:
            SpecError: a rule holds code (a module, a function, a predicate), which no plain file can carry.
        """
        return files.to_dict(self._rules)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Spec:
        """The inverse of ``to_dict``. Only catalogue entries can be named; nothing is imported.

        Raises:
            SpecError: the text is not a spec; the message names the rule and what was expected.
        """
        return cls(files.from_dict(data))

    def save(self, path: str | Path) -> None:
        """Write the spec as ``.yaml``/``.yml`` or ``.json``, by the ending of ``path``."""
        files.write(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Spec:
        """Read what ``save`` wrote."""
        return cls.from_dict(files.read(Path(path)))


def ref(*targets: str) -> Ref:
    """Reads other weights: ``ref("encoder.weight") >> transpose()``. ``ref("encoder.weight.original")`` reads the latent.

    Raises:
        SpecError: no name, or not a string.
    """
    if not targets or not all(isinstance(target, str) for target in targets):
        raise SpecError(f"got ref{targets!r}; expected names of weights, as in fxp.ref('encoder.weight')")
    return Ref(targets)


def existing() -> Existing:
    """What already computes a weight: ``existing() >> mask(density=0.5)`` extends it."""
    return Existing()


def _checked(rule: Selector, value: Declaration) -> Declaration:
    for step in steps_of(value)[1:]:
        if isinstance(step, Ref | Existing):
            raise SpecError(f"rule {rule}: {step!r} stands inside the chain {value!r}; it can only come first")
    return value
