"""Tables of cases: functions by their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def collector(table: dict[str, Function]) -> Callable[[Function], Function]:
    """A decorator that enters functions into a table."""

    def enter(function: Function) -> Function:
        table[function.__name__] = function
        return function

    return enter
