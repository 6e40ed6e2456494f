"""Inverses of the matrix exponential and of the Cayley map: from a rotation to a skew-Hermitian matrix.

Everything here is done in double precision and once for each assignment, never while training.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_NEAR_MINUS_ONE = -0.9  # cosines of angles for which the plain square root would lose accuracy
_CUT_WINDOW = -0.3  # cosines among which the cut between the two halves of the spectrum is placed
_ROOTS = 4  # square roots before the series: angles below π/16, so that its terms fall by a factor of 100
_TERMS = 9


def inverse_cayley(q: Tensor) -> Tensor:
    """Blocks ``(A1; B)`` of the ``A = ((A1, -Bᴴ), (B, 0))`` whose Cayley transform begins with the columns of ``q``.

    For ``q = (Q1; Q2)`` of shape ``(..., n, k)`` with orthonormal columns. ``(I - A/2) Q = (I + A/2) I[:, :k]`` gives,
    with ``S = (I + Q1)⁻¹``, ``B = 2 Q2 S`` and ``A1 = 2 Sᴴ (Q1 - Q1ᴴ) S``. NaN or huge where ``I + Q1`` is singular,
    which the Cayley map does not reach.
    """
    k = q.shape[-1]
    top, bottom = q[..., :k, :], q[..., k:, :]
    inverse, info = torch.linalg.inv_ex(top + torch.eye(k, dtype=q.dtype, device=q.device))
    inverse = torch.where((info != 0)[..., None, None], math.nan, inverse)
    return torch.cat([2 * inverse.mH @ (top - top.mH) @ inverse, 2 * bottom @ inverse], dim=-2)


def inverse_exp(q: Tensor) -> Tensor:
    """A skew-Hermitian ``A`` of shape ``(..., n, n)`` with ``exp(A) == q``, for square ``q``.

    Every unitary matrix has one; a real ``q`` must have determinant 1. Angles of π are no exception.
    """
    one = _log_unitary if q.is_complex() else _log
    return torch.stack([one(matrix) for matrix in q.reshape(-1, *q.shape[-2:])]).reshape(q.shape)


def _log(q: Tensor) -> Tensor:
    """A skew logarithm of a rotation."""
    cosines, basis = torch.linalg.eigh((q + q.mT) / 2)
    cut = _cut(cosines.tolist())
    near, far = basis[:, :cut], basis[:, cut:]
    log = far @ _log_far(far.mT @ q @ far) @ far.mT
    if cut:
        # There -q is far from -1. With log(-q) = L and J² = -I, J L = L J: exp(L + πJ) = -exp(L) = q.
        opposite = _log_far(-near.mT @ q @ near)
        log = log + near @ (opposite + math.pi * _complex_structure(opposite)) @ near.mT
    return (log - log.mT) / 2


def _log_unitary(q: Tensor) -> Tensor:
    """A skew-Hermitian logarithm whose branch cut is where the spectrum leaves most room."""
    angles = torch.linalg.eigvals(q).angle().sort()[0]
    gaps = torch.diff(angles, append=angles[:1] + 2 * math.pi)
    widest = int(gaps.argmax())
    turn = float(angles[widest] + gaps[widest] / 2) - math.pi
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return _log_far(q * complex(math.cos(turn), -math.sin(turn))) + 1j * turn * eye


def _cut(cosines: list[float]) -> int:
    """How many of the ascending cosines to treat as near -1: an even number, at the widest gap of a window."""
    if not cosines or cosines[0] > _NEAR_MINUS_ONE:
        return 0
    bounds = [*cosines, 1.0]
    places = [j for j in range(2, len(cosines) + 1, 2) if bounds[j - 1] <= _CUT_WINDOW]
    return max(places, key=lambda j: bounds[j] - bounds[j - 1], default=0)


def _log_far(q: Tensor) -> Tensor:
    """The principal logarithm of a rotation without eigenvalues near -1.

    Square roots by polar decomposition of ``I + q``, whose unitary factor is the root; then ``log q = 2 artanh T`` with
    ``T = (q - I)(q + I)⁻¹``.
    """
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    for _ in range(_ROOTS):
        u, _, vh = torch.linalg.svd(q + eye)
        q = u @ vh
    t = torch.linalg.solve(q + eye, q - eye)
    t = (t - t.mH) / 2
    square, power, total = t @ t, t, t
    for j in range(1, _TERMS):
        power = power @ square
        total = total + power / (2 * j + 1)
    return 2 ** (_ROOTS + 1) * total


def _complex_structure(skew: Tensor) -> Tensor:
    """A skew ``J`` with ``J² = -I`` that commutes with ``skew`` (of even size), one invariant plane after the other."""
    size = skew.shape[-1]
    found = torch.zeros_like(skew)
    rest = torch.eye(size, dtype=skew.dtype, device=skew.device)
    while rest.shape[1]:
        inner = rest.mT @ skew @ rest
        inner = (inner - inner.mT) / 2
        v = torch.linalg.eigh(inner.mT @ inner)[1][:, -1]
        u = inner @ v
        angle = torch.linalg.vector_norm(u)
        # A plane that is turned by less than rounding is a choice: any direction beside v will do.
        beside = nn.functional.one_hot(v.abs().argmin(), v.numel()).to(v)
        u = u / angle if angle > size * torch.finfo(skew.dtype).eps else beside
        basis = torch.linalg.qr(torch.stack([v, u], dim=1), mode="complete")[0]
        first, second = (rest @ basis[:, :2]).unbind(dim=1)
        found = found + torch.outer(second, first) - torch.outer(first, second)
        rest = rest @ basis[:, 2:]
    return found
