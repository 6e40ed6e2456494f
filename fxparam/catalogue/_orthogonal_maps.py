"""From a tall latent ``(..., n, k)``, ``n >= k``, to orthonormal columns of the same shape; ``k`` at most ``n``.

Those of PyTorch read the lower triangle:

- ``matrix_exp``: ``exp(A)[:, :k]`` with ``A = tril X - (tril X)ᴴ``, padded to a square (Lezcano-Casado and
  Martínez-Rubio 2019);
- ``cayley``: ``(I - A/2)⁻¹ (I + A/2)`` of the same ``A`` (Helfrich, Willmott and Ye 2018);
- ``householder``: the product of the reflections along the columns of ``tril(X, -1) + I`` (Mhammedi et al. 2017).

The others bring the whole latent to the set, do not see its length, and keep what is orthonormal already:

- ``qr``: ``Q`` of ``X = Q R`` with a positive diagonal of ``R``;
- ``polar``: ``Q`` of ``X = Q H`` with a positive semidefinite ``H``: the nearest orthonormal matrix (Fan and Hoffman 1955);
- ``newton_schulz``: the limit of ``X ← X (3I - XᴴX) / 2``, which is the polar factor (Björck and Bowie 1971).

The derivatives of ``qr`` and ``polar`` are written out rather than left to the decompositions: those of a singular value
decomposition divide by differences of singular values, and so are NaN at every orthonormal matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxparam.catalogue._image import rounding

_EXPONENTIAL_MISSES = {torch.float32: 256.0, torch.float64: 1e5}
"""Roundings that ``torch.matrix_exp`` of a small single matrix may miss unitarity by: 110 and 43,000 were measured, at norms
around 0.03, where it takes few terms. Of a batch it is exact to a few."""


def rotation_rounding(map: str, dtype: torch.dtype) -> float:
    """How far ``rotation`` may be from orthonormal columns, besides the rounding of products."""
    real = real_dtype(dtype)
    return _EXPONENTIAL_MISSES.get(real, 0.0) * torch.finfo(real).eps if map == "matrix_exp" else 0.0


def rotation(x: Tensor, map: str) -> Tensor:
    """``exp`` or Cayley transform of the skew-Hermitian matrix with the lower triangle of ``x``; its first columns."""
    n, k = x.shape[-2:]
    lower = x.tril()
    if n != k:
        lower = torch.cat([lower, lower.new_zeros(n, n - k).expand(*x.shape[:-2], -1, -1)], dim=-1)
    skew = lower - lower.mH
    if map == "matrix_exp":
        q = torch.matrix_exp(skew)
    else:
        identity = torch.eye(n, dtype=skew.dtype, device=skew.device)
        # Singular only if rounding loses the identity. Not to check saves a wait for the device.
        q = torch.linalg.solve_ex(torch.add(identity, skew, alpha=-0.5), torch.add(identity, skew, alpha=0.5))[0]
    return q if n == k else q[..., :k]


def reflections(x: Tensor) -> Tensor:
    """The product of the reflections along the columns of ``tril(x, -1) + I``, times the signs on the diagonal of ``x``.

    Elements whose squares would overflow count as the largest whose squares do not, of the same sign.
    """
    longest = torch.finfo(x.dtype).max ** 0.4
    vectors = x.tril(diagonal=-1).clamp(-longest, longest)
    tau = 2.0 / (1.0 + (vectors * vectors).sum(dim=-2))
    diagonal = x.diagonal(dim1=-2, dim2=-1).detach()
    return torch.linalg.householder_product(vectors, tau) * torch.ones_like(diagonal).copysign(diagonal).unsqueeze(-2)


def qr_factor(x: Tensor) -> Tensor:
    """The ``Q`` of ``x = Q R`` with a real, positive diagonal of ``R``.

    With constant ``Q₀, R₀`` for the present ``x₀``: the factor is the same for ``x R₀⁻¹ = Q₀ + (x - x₀) R₀⁻¹``, whose Gram
    matrix is ``I``, and there a Cholesky decomposition gives it, with derivatives of every order.

    A column that depends on those before it gets a direction that LAPACK chooses, and the derivative of a column that
    has this direction and the length of the largest element of ``x``.
    """
    y = x / _length(x)
    fixed = y.detach()
    q, r = torch.linalg.qr(fixed)
    signs = r.diagonal(dim1=-2, dim2=-1).sgn()
    signs = torch.where(signs == 0, 1, signs)
    q, r = q * signs.unsqueeze(-2), r * signs.conj().unsqueeze(-1)
    weak = r.diagonal(dim1=-2, dim2=-1).abs() <= _negligible(x)
    r = torch.where(weak.unsqueeze(-1), torch.eye(r.shape[-1], dtype=r.dtype, device=r.device), r)
    near = q + torch.linalg.solve_triangular(r, y - fixed, upper=True, left=False)
    factor = torch.linalg.cholesky_ex(near.mH @ near)[0]
    return torch.linalg.solve_triangular(factor.mH, near, upper=True, left=False)


def polar_factor(x: Tensor) -> Tensor:
    """The ``Q`` of ``x = Q H`` with orthonormal columns and a Hermitian, positive semidefinite ``H``.

    The value is ``U Vᴴ`` of the singular value decomposition ``x₀ = U S Vᴴ`` of the present ``x₀``. The derivatives are those
    of two steps of Newton's method from there, with its matrix kept at ``x₀``; each step makes derivatives of one more
    order right (the first two are). A step corrects ``Q`` by ``Q₀ Ω + B``, where in the basis of ``V``
    ``Ω S + S Ω = Qᴴx - xᴴQ``, so that it divides by *sums* of singular values, and ``B S`` is the part of ``x`` outside the
    range of ``Q₀``.

    A singular value that is zero up to rounding gets the vectors that LAPACK chooses, and the derivative of one as large
    as the largest element of ``x``.
    """
    n, k = x.shape[-2:]
    y = x / _length(x)
    # LAPACK refuses NaN; through ``y`` it still reaches the weight, where it is looked for.
    u, s, vh = torch.linalg.svd(y.detach().nan_to_num(), full_matrices=False)
    s = torch.where(s <= _negligible(x), 1, s)
    sums = s.unsqueeze(-1) + s.unsqueeze(-2)
    p = y @ vh.mH
    change = p - p.detach()  # zero

    def corrected(q: Tensor, change: Tensor) -> Tensor:
        """``q`` after a step, for ``change`` whose ``qᴴ change`` differs from ``qᴴ p`` by what is Hermitian."""
        inner = q.mH @ change
        step = u @ ((inner - inner.mH) / sums)
        if n > k:
            outside = change - q @ inner
            step = step + (outside - u @ (u.mH @ outside)) / s.unsqueeze(-2)
        return q + step

    first = corrected(u, change)
    # Back among orthonormal columns, up to terms of higher order than the next step mends.
    first = 1.5 * first - 0.5 * first @ (first.mH @ first)
    second = corrected(first, p) @ vh
    return u @ vh + (second - second.detach())


def newton_schulz(x: Tensor, iterations: int) -> Tensor:
    """``iterations`` steps of ``X ← X (3I - XᴴX) / 2`` from ``x`` over its Schatten norm of order 16.

    The norm is at least the largest singular value and at most ``k^(1/16)`` times that. A step takes a singular value
    ``s`` in (0, 1] to ``s (3 - s²) / 2`` and leaves ``1 - s`` at ``(1 - s)² (1 + s/2)``: far from 1 it grows by a factor of
    3/2, near 1 the error is squared. So the singular values that are at least ``c`` times the largest reach 1 up to rounding
    after about ``log(1 / c) / log(3/2) + 7`` steps; one that is zero stays zero. The zero matrix counts as the identity.
    """
    identity = torch.eye(*x.shape[-2:], dtype=x.dtype, device=x.device)
    y = x / _length(x)
    y = torch.where(_vanishes(x), y + identity, y)
    gram = y.mH @ y
    size = _frobenius(gram)
    gram = gram / size
    gram = gram @ gram
    y = y / (size * _frobenius(gram @ gram) ** 0.25).sqrt()
    start = 1.5 * torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
    for _ in range(iterations):
        y = y @ torch.add(start, y.mH @ y, alpha=-0.5)
    return y


def orthonormalized(a: Tensor) -> Tensor:
    """The Q of ``a = Q R`` with a real positive diagonal of R; without derivatives."""
    packed, tau = torch.geqrf(a)
    signs = packed.diagonal(dim1=-2, dim2=-1).sgn()
    return torch.linalg.householder_product(packed, tau) * torch.where(signs == 0, 1, signs).unsqueeze(-2)


def completed(q: Tensor) -> Tensor:
    """``q``, bit for bit, with random columns added (torch's draws) until it is square and orthogonal."""
    n, k = q.shape[-2:]
    if n == k:
        return q
    wide = q if q.dtype not in (torch.float16, torch.bfloat16) else q.float()
    drawn = torch.randn(*q.shape[:-2], n, n - k, dtype=wide.dtype, device=q.device)
    return torch.cat([q, orthonormalized(torch.cat([wide, drawn], dim=-1))[..., k:].to(q.dtype)], dim=-1)


def inverse_reflections(q: Tensor) -> Tensor:
    """The reflections LAPACK finds for a QR decomposition, with the signs of R on the diagonal."""
    latent, tau = torch.geqrf(q)
    diagonal = latent.diagonal(dim1=-2, dim2=-1)
    # LAPACK skips a reflection by tau = 0 exactly; ours along a zero column is -1 on the diagonal instead.
    diagonal.copy_(torch.where(tau == 0, -diagonal.sign(), diagonal.sign()))
    return latent


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of absolute values of ``dtype``."""
    return dtype.to_real() if dtype.is_complex else dtype


def _largest(x: Tensor) -> Tensor:
    """The largest absolute value of each matrix, ``(..., 1, 1)``, a constant."""
    return x.detach().abs().amax(dim=(-2, -1), keepdim=True)


def _vanishes(x: Tensor) -> Tensor:
    """Whether a matrix is so small that derivatives of what does not see its length would overflow."""
    limits = torch.finfo(real_dtype(x.dtype))
    return _largest(x) <= limits.tiny / limits.eps


def _length(x: Tensor) -> Tensor:
    """What to divide by so that squares neither overflow nor underflow; 1 for a matrix that vanishes.

    A constant: maps that do not see the length of ``x`` have the same derivatives with it.
    """
    return torch.where(_vanishes(x), 1, _largest(x))


def _negligible(x: Tensor) -> float:
    """What is zero up to rounding beside elements of 1."""
    return rounding(real_dtype(x.dtype), x.shape[-2])


def _frobenius(x: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(x, keepdim=True)
