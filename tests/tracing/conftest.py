"""What the tests of the tracer share: double precision, so that rounding hides nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.register_assert_rewrite("tracing.common", "tracing.maps")


@pytest.fixture(autouse=True)
def _float64() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
