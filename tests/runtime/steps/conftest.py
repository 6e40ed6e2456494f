"""The asserts of the helpers of these tests say what they compared."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("runtime.steps.common")
