"""What the situations share: double precision, and parameters that are not swapped on conversion."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from runtime.fixtures import double_precision

__all__ = ["double_precision"]

pytest.register_assert_rewrite("runtime.situations.common")


@pytest.fixture(autouse=True)
def _not_swapping() -> Iterator[None]:
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)
