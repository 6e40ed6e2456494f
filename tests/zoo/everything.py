"""The whole zoo."""

from __future__ import annotations

from zoo import from_diffusers, from_timm, from_transformers, plain, plain_sequences

ENTRIES = (
    *plain.ENTRIES,
    *plain_sequences.ENTRIES,
    *from_transformers.ENTRIES,
    *from_diffusers.ENTRIES,
    *from_timm.ENTRIES,
)
