"""How often weights were computed, and how often they were at hand."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Stats:
    """Counts since the transform. Threads that read at once may lose a few.

    Attributes:
        refreshes: evaluations of the prologue.
        hits: root forwards, and reads outside one, that found the weights current.
        backwards: evaluations of the prologue's backward (of a connected component).
        inlined: forwards that computed the prologue in place (compilation, functorch, replaced latents).
    """

    refreshes: int = 0
    hits: int = 0
    backwards: int = 0
    inlined: int = 0

    def __getitem__(self, name: str) -> int:
        return int(getattr(self, name))
