"""What the tests of layers share: double precision."""

from __future__ import annotations

from runtime.fixtures import double_precision

__all__ = ["double_precision"]
