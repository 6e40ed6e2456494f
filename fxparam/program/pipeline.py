"""The protocol of passes and the small driver that runs a pipeline of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

from fxparam.errors import PassError
from fxparam.program.program import Program


class Pass(ABC):
    """A rewrite of programs: a frozen dataclass whose fields are its options.

    A pass never changes its input, never copies a tensor, and returns the same object when it changed nothing.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    """Facts that must hold before."""
    gives: ClassVar[frozenset[str]] = frozenset()
    """Facts that hold after."""

    @abstractmethod
    def rewrite(self, program: Program) -> Program:
        """The program after this pass."""

    def verify(self, before: Program, after: Program) -> None:  # noqa: B027
        """Check the promise of this pass on its result.

        Raises:
            PassError: the promise is broken.
        """


def run(program: Program, pipeline: Iterable[Pass]) -> Program:
    """Run passes one after the other, each checked before and after.

    Raises:
        PassError: a pass needs a fact that no earlier pass gave, or its result fails verification.
    """
    for step in pipeline:
        missing = step.requires - program.facts
        if missing:
            raise PassError(f"pass {step.name} needs {', '.join(sorted(missing))}; run the pass that gives it first")
        after = step.rewrite(program)
        if after is not program:
            try:
                after.verify()
                step.verify(program, after)
            except PassError as error:
                raise PassError(f"pass {step.name}: {error}") from error
        program = after if step.gives <= after.facts else after.evolve(facts=after.facts | step.gives)
    return program
