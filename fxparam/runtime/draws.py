"""The random numbers of one step: what one evaluation drew, another one of the same step draws again."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fxparam.tracer.hazards import generator_states, preserved_generators


class Draws:
    """The generators before and after an evaluation."""

    def __init__(self) -> None:
        self._before, self._after = generator_states(), generator_states()
        self._python = random.getstate()
        self._numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None

    @classmethod
    @contextmanager
    def around(cls, last: Draws | None) -> Iterator[Draws]:
        """Around an evaluation that draws.

        Args:
            last: those of an evaluation in the same step: they are drawn again, and the generators stay as they are.
        """
        if last is not None:
            with preserved_generators():
                last._begin_again()
                yield last
            return
        draws = cls()
        yield draws
        draws._after = generator_states()

    def _begin_again(self) -> None:
        _set(self._before)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)

    def replay(self) -> None:
        """Move PyTorch's generators on, if they are as they were before the evaluation.

        A checkpoint computes again with the generators of its beginning. After a read it must find those of the first time,
        also where the first time evaluated and this time need not.
        """
        now = generator_states()
        if len(now) == len(self._before) and all(map(torch.equal, now, self._before)):
            _set(self._after)


def _set(states: tuple[Tensor, ...]) -> None:
    torch.set_rng_state(states[0])
    for device, state in enumerate(states[1:]):
        torch.cuda.set_rng_state(state, device)
