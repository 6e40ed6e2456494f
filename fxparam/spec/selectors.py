"""Which weights a rule is about.

A selector looks at one ``NamedTensor`` and says yes or no. Parameters come first: a selector that
matches at least one parameter says nothing about buffers, so that ``"*"`` means the trainable part of a model and
``"*.running_mean"`` still reaches a buffer.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import final

from torch import Tensor, nn

from fxparam.errors import SpecError
from fxparam.spec.names import PARAMETRIZATIONS, NamedTensor


class Selector(ABC):
    """Chooses tensors by name, type of owner, or any other property."""

    @abstractmethod
    def matches(self, row: NamedTensor) -> bool:
        """Whether the rule is about this tensor, under any of its names."""

    @property
    def reaches_latents(self) -> bool:
        """Whether the selector spells out ``parametrizations`` and so may reach latents."""
        return False


@final
@dataclass(frozen=True)
class Glob(Selector):
    """A case-sensitive glob over dotted names; ``*`` crosses dots."""

    pattern: str

    def matches(self, row: NamedTensor) -> bool:
        return any(fnmatchcase(name, self.pattern) for name in row.aliases)

    @property
    def reaches_latents(self) -> bool:
        return PARAMETRIZATIONS in self.pattern

    def __str__(self) -> str:
        return repr(self.pattern)


@final
@dataclass(frozen=True)
class Regex(Selector):
    """A compiled regular expression that must match a whole dotted name."""

    pattern: re.Pattern[str]

    def matches(self, row: NamedTensor) -> bool:
        return any(self.pattern.fullmatch(name) for name in row.aliases)

    @property
    def reaches_latents(self) -> bool:
        return PARAMETRIZATIONS in self.pattern.pattern

    def __str__(self) -> str:
        return f"re.compile({self.pattern.pattern!r})"


@final
@dataclass(frozen=True)
class Where(Selector):
    """Tensors of owners of one type (subclasses included) whose local name fits a glob."""

    module_type: type[nn.Module]
    name_glob: str = "weight"

    def __post_init__(self) -> None:
        if not (isinstance(self.module_type, type) and issubclass(self.module_type, nn.Module)):
            raise SpecError(f"got {self.module_type!r} in where(...); expected a module class, as in fxp.where(nn.Linear)")

    def matches(self, row: NamedTensor) -> bool:
        return any(isinstance(owner, self.module_type) and fnmatchcase(local, self.name_glob) for owner, local in row.places)

    def __str__(self) -> str:
        return f"where({self.module_type.__name__}, {self.name_glob!r})"


@final
@dataclass(frozen=True)
class Predicate(Selector):
    """A function ``(name, tensor, owner) -> bool``, asked for each alias."""

    function: Callable[[str, Tensor, nn.Module], bool]

    def matches(self, row: NamedTensor) -> bool:
        return any(
            bool(self.function(name, row.tensor, owner)) for name, (owner, _) in zip(row.aliases, row.places, strict=True)
        )

    def __str__(self) -> str:
        return f"predicate {getattr(self.function, '__name__', self.function)}"


@final
@dataclass(frozen=True)
class Joint(Selector):
    """The union of several selectors, whose weights one declaration yields together."""

    parts: tuple[Selector, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise SpecError('joint() is empty; name what it joins, as in fxp.joint("head.*")')
        if any(isinstance(part, Joint) for part in self.parts):
            raise SpecError("joint(...) inside joint(...); list all selectors in one joint(...)")

    def matches(self, row: NamedTensor) -> bool:
        return any(part.matches(row) for part in self.parts)

    @property
    def reaches_latents(self) -> bool:
        return any(part.reaches_latents for part in self.parts)

    def __str__(self) -> str:
        return f"joint({', '.join(map(str, self.parts))})"


def selector(value: object) -> Selector:
    """``value`` as a selector: strings are globs, compiled patterns regular expressions, callables predicates.

    Raises:
        SpecError: ``value`` is none of the forms a spec accepts.
    """
    if isinstance(value, Selector):
        return value
    if isinstance(value, str):
        return Glob(value)
    if isinstance(value, re.Pattern):
        return Regex(value)
    if callable(value) and not isinstance(value, type):
        return Predicate(value)
    raise SpecError(
        f"got {value!r} ({type(value).__name__}) as a selector; expected a glob such as 'encoder.*.weight', a compiled "
        "regex, fxp.where(nn.Linear, 'weight'), fxp.joint(...), or a predicate (name, tensor, owner) -> bool"
    )


def where(module_type: type[nn.Module], name_glob: str = "weight") -> Where:
    """Tensors named like ``name_glob`` of every module of this type: ``where(nn.Conv1d, "weight")``."""
    return Where(module_type, name_glob)


def joint(*selectors: object) -> Joint:
    """One declaration for all the weights these selectors match, in registration order: ``joint("head.*")``."""
    return Joint(tuple(selector(value) for value in selectors))
