"""Every error fxparam raises.

All derive from ``FxparamError``, so that one ``except`` catches them, and each also derives from the built-in error a
PyTorch user would have expected in its place (``ValueError`` for a bad argument, ``RuntimeError`` for a bad state).
A message says what was found, what was expected, and what to type.
"""

from __future__ import annotations


class FxparamError(Exception):
    """Base of all errors raised by fxparam."""


class SpecError(FxparamError, ValueError):
    """A rule cannot be applied: nothing matches, two rules meet on one weight, references form a cycle, a bad file."""


class ImageError(FxparamError, ValueError):
    """A weight is not in the image of its parametrization, so no latent produces it."""


class AdoptionError(FxparamError, ValueError):
    """A rule is for a weight that the model computes already, in a way that cannot be taken over."""


class TraceError(FxparamError, RuntimeError):
    """A graph was asked for and this model (or this parametrization) cannot be traced faithfully."""


class PassError(FxparamError, RuntimeError):
    """A pass broke its promise: its result failed verification. Nothing of the result is used."""


class StaleWeightsError(FxparamError, RuntimeError):
    """A cached weight differs from the value its latents give now (raised under ``FXPARAM_CHECK=1``)."""


class NonFiniteError(FxparamError, RuntimeError):
    """The weights cannot be computed because latents hold NaN or infinity; the message names them and their sites."""


class DeferralError(FxparamError, RuntimeError):
    """Deferred gradients are pending where they would be lost or misplaced."""


class ExportError(FxparamError, RuntimeError):
    """A model cannot be exported, or the exported model does not reproduce it. No file was changed."""


class MissingExtraError(FxparamError, ImportError):
    """An optional dependency is needed; the message names the extra to install."""


def missing_extra(package: str, extra: str, purpose: str) -> MissingExtraError:
    """The error for an optional package that is not installed.

    Args:
        package: the import that failed, ``"onnx"``.
        extra: the extra of fxparam that brings it, ``"onnx"``.
        purpose: what it is needed for, ``"to export ONNX files"``.
    """
    return MissingExtraError(f"{package} is needed {purpose} and is not installed; type: pip install 'fxparam[{extra}]'")
