"""Weights mixed from given checkpoints.

``W = Σ cᵢ Wᵢ`` (learned soups, Wortsman et al. 2022, *Model soups*) or ``W = θ₀ + Σ cᵢ (Wᵢ - θ₀)`` (task arithmetic, Ilharco
et al. 2023, *Editing Models with Task Arithmetic*): only the coefficients train.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxparam.catalogue._image import check_flag, shape_text, stored, widened
from fxparam.catalogue.joint import JointEntry, SpannedMap, Weights, check_joint
from fxparam.declaration import Place
from fxparam.errors import SpecError, missing_extra

Checkpoint = Tensor | Mapping[str, Tensor] | str | os.PathLike[str] | Sequence[Any]


@dataclass(frozen=True, repr=False, eq=False)
class Mixture(JointEntry):
    """``W = Σ cᵢ Wᵢ``, a mixture of checkpoints whose coefficients ``c`` train.

    Starts at the coefficients whose mixture is nearest to the present weight, or with ``origin`` at zero, where the weight is
    what it was. For one weight or for all of a ``joint`` rule, which then share their coefficients.

    Args:
        checkpoints: at least one. Each is a state dict (name -> tensor), the path of one as safetensors or torch file (read
            with ``weights_only=True``), or, for a single weight, a tensor or nested lists of numbers.
        normalize: whether the coefficients are the softmax of the latent: positive, of sum 1.
        origin: whether the checkpoints count as steps ``Wᵢ - θ₀`` from the present weight ``θ₀``. Not together with
            ``normalize``, which would cancel it.
        names: the names of the weights in the checkpoints; by default those they have in the model.

    Raises:
        SpecError: no checkpoints, or an option of another type; at build, a file cannot be read, a checkpoint does not have the
            weight in its shape, or holds NaN or infinity, or the weights are on several devices or not floating-point.
        MissingExtraError: at build, a safetensors file without the package that reads it.
    """

    name: ClassVar[str] = "mixture"
    checkpoints: Sequence[Checkpoint]
    normalize: bool = False
    origin: bool = False
    names: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_flag(self.name, "normalize", self.normalize)
        check_flag(self.name, "origin", self.origin)
        if self.normalize and self.origin:
            raise SpecError("mixture: got normalize=True and origin=True; steps of sum 1 cancel the origin: give one of them")
        if not isinstance(self.checkpoints, Sequence) or isinstance(self.checkpoints, str) or not self.checkpoints:
            raise SpecError(
                f"mixture: got checkpoints={_described(self.checkpoints)}; expected a list of state dicts, paths or tensors"
            )
        object.__setattr__(self, "checkpoints", tuple(map(_plain, self.checkpoints)))
        object.__setattr__(self, "names", (self.names,) if isinstance(self.names, str) else tuple(self.names))

    def placed(self, place: Place) -> Mixture:
        """With the names of this place, where none are given."""
        return self if self.names else replace(self, names=place.names)

    def build(self, weight: Tensor) -> MixtureMap:
        """The map for one weight: ``forward`` returns a tensor."""
        check_joint(self.name, (weight,))
        return MixtureMap((weight,), self._ingredients((weight,)), self, single=True)

    def build_joint(self, weights: Sequence[Tensor]) -> MixtureMap:
        """The map for several weights, with one coefficient for each checkpoint."""
        check_joint(self.name, weights)
        return MixtureMap(tuple(weights), self._ingredients(weights), self, single=False)

    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults, as plain values.

        Raises:
            SpecError: a checkpoint is given by its tensors, which a spec file cannot hold.
        """
        for one in self.checkpoints:
            if isinstance(one, Tensor | Mapping):
                raise SpecError(
                    f"mixture: a checkpoint is a {_described(one)}, and tensors cannot be written to a spec file; save it and "
                    "give its path"
                )
        return {key: list(value) if isinstance(value, tuple) else value for key, value in super().options().items()}

    def _ingredients(self, weights: Sequence[Tensor]) -> list[list[Tensor]]:
        """For each checkpoint its tensors, in the order of the weights."""
        named = any(isinstance(one, str | Mapping) for one in self.checkpoints)
        if named and len(self.names) != len(weights):
            raise SpecError(
                f"mixture: got {len(self.names)} names for {len(weights)} weights; type names=[...] with the names of the "
                "weights in the checkpoints"
            )
        found = [_tensors(one, self.names, len(weights)) for one in self.checkpoints]
        for one, tensors in zip(self.checkpoints, found, strict=True):
            for tensor, weight in zip(tensors, weights, strict=True):
                _check(one, tensor, weight)
        return found

    def __repr__(self) -> str:
        rest = {"normalize": self.normalize, "origin": self.origin, "names": self.names}
        given = "".join(f", {key}={value!r}" for key, value in rest.items() if value)
        return f"mixture([{', '.join(map(_described, self.checkpoints))}]{given})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mixture):
            return NotImplemented
        mine, theirs = ((m.normalize, m.origin, m.names, [_comparable(c) for c in m.checkpoints]) for m in (self, other))
        return mine == theirs

    def __hash__(self) -> int:
        return hash((self.normalize, self.origin, self.names, len(self.checkpoints)))


class MixtureMap(SpannedMap):
    """``W = Σ cᵢ Wᵢ``, with the latent ``c``, ``(k,)``, or its softmax.

    The buffer ``ingredients``, ``(k, total)`` in the widest dtype among the weights, holds the checkpoints, or with ``origin``
    their differences from the buffer ``origin``, ``(total,)``. Both are in the state dict, for no weight could be told from
    coefficients alone: a saved model is ``k`` times as large as the plain one until it is folded, and never computes with the
    ingredients of another.

    The right inverse is least squares in float64. Where ingredients depend on each other, it gives the shortest solution. Of a
    softmax, coefficients 0 count as in the image, whose closure they are.
    """

    ingredients: Tensor
    origin: Tensor | None
    _ITERATIONS = 2000

    def __init__(
        self, weights: Sequence[Tensor], ingredients: Sequence[Sequence[Tensor]], entry: Mixture, *, single: bool
    ) -> None:
        super().__init__(weights, single=single)
        self.normalize = entry.normalize
        device = weights[0].device
        rows = [torch.cat([t.detach().flatten().to(device, self.widest) for t in tensors]) for tensors in ingredients]
        origin = torch.cat([weight.detach().flatten().to(self.widest) for weight in weights]) if entry.origin else None
        self.register_buffer("ingredients", torch.stack(rows) if origin is None else torch.stack(rows) - origin)
        self.register_buffer("origin", origin)
        kind = "mixtures with positive coefficients of sum 1" if self.normalize else "mixtures"
        self.span = f"the set of {kind} of {len(rows)} checkpoints"
        self.depth = len(rows) + 2

    def forward(self, latent: Tensor) -> Tensor | tuple[Tensor, ...]:  # type: ignore[override]
        """``(k,)`` to the weights."""
        coefficients = widened(latent).softmax(0) if self.normalize else widened(latent)
        mixed = coefficients @ widened(self.ingredients)
        if self.origin is not None:
            mixed = widened(self.origin) + mixed
        return self.split(stored(mixed, latent.dtype))

    def solve(self, vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The nearest mixture."""
        ingredients = self.ingredients.double()
        if self.normalize:
            found = self._fractions(ingredients, vector)
            latent = found.clamp(min=torch.finfo(self.widest).tiny).log()
        else:
            latent = found = _least_squares(ingredients, vector if self.origin is None else vector - self.origin)
        image, largest = found @ ingredients, (found.abs() @ ingredients.abs()).amax()
        return latent, image if self.origin is None else self.origin + image, largest

    @torch.no_grad()
    def start(self, weight: Weights) -> Tensor:
        """The coefficients of the nearest mixture; those of a softmax are mixed with one percent of equal ones.

        A coefficient of 0 under a softmax would never train.
        """
        latent, _, _ = self.solve(self.joined(weight).double())
        if self.normalize:
            latent = (0.99 * latent.softmax(0) + 0.01 / len(latent)).log()
        return latent.to(self.widest)

    def _fractions(self, ingredients: Tensor, vector: Tensor) -> Tensor:
        """The nearest mixture with coefficients of at least 0 and of sum 1: accelerated projected gradients (FISTA, 2009)."""
        mean = ingredients.mean(0)
        centred = ingredients - mean
        # The shortest solution has sum 0: the centred ingredients have.
        found = _least_squares(centred, vector - mean) + 1 / len(ingredients)
        if found.amin() >= 0:
            return found / found.sum()
        gram, target = centred @ centred.mT, centred @ (vector - mean)
        rate = 1 / torch.linalg.eigvalsh(gram)[-1].clamp(min=torch.finfo(gram.dtype).tiny)
        found = ahead = _onto_simplex(found)
        momentum = 1.0
        for _ in range(self._ITERATIONS):
            before, found = found, _onto_simplex(ahead - rate * (gram @ ahead - target))
            last, momentum = momentum, (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            ahead = found + (last - 1) / momentum * (found - before)
        return found

    @torch.no_grad()
    def sample(  # type: ignore[override]
        self, *, generator: torch.Generator | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """The mixture for a latent of independent standard normal elements."""
        return self.forward(self.normal(len(self.ingredients), generator))

    def extra_repr(self) -> str:
        """The options and sizes."""
        of = ", origin=True" if self.origin is not None else ""
        return f"checkpoints={len(self.ingredients)}, total={self.total}, normalize={self.normalize}{of}"


def _least_squares(rows: Tensor, target: Tensor) -> Tensor:
    """The shortest ``c`` with the smallest ``|Σ cᵢ rowsᵢ - target|``."""
    # The other devices have only a method for full rank.
    solution = torch.linalg.lstsq(rows.mT.cpu(), target.unsqueeze(-1).cpu(), driver="gelsd").solution
    return solution.squeeze(-1).to(target.device)


def _onto_simplex(vector: Tensor) -> Tensor:
    """The nearest vector of elements of at least 0 and of sum 1 (Duchi et al. 2008, figure 1)."""
    falling = vector.sort(descending=True).values
    excess = (falling.cumsum(0) - 1) / torch.arange(1, len(vector) + 1, device=vector.device)
    kept = int((falling > excess).sum())
    return (vector - excess[kept - 1]).clamp(min=0)


def _plain(one: Any) -> Checkpoint:
    """A checkpoint as the entry keeps it: a tensor, a dictionary, a path as string, or nested lists."""
    match one:
        case Tensor():
            return one.detach()
        case Mapping():
            return {str(name): tensor.detach() for name, tensor in one.items() if isinstance(tensor, Tensor)}
        case str() | os.PathLike():
            return os.fspath(one)
        case list() | tuple():
            return _lists(one)
    raise SpecError(f"mixture: got the checkpoint {one!r}; expected a state dict, a path, a tensor, or nested lists of numbers")


def _lists(values: Any) -> Any:
    if isinstance(values, list | tuple):
        return [_lists(value) for value in values]
    if isinstance(values, int | float) and not isinstance(values, bool):
        return values
    raise SpecError(f"mixture: got {values!r} in a checkpoint; expected a tensor, or nested lists of numbers")


def _described(one: Any) -> str:
    match one:
        case Tensor():
            return f"tensor of shape {shape_text(one)}"
        case Mapping():
            return f"state dict of {len(one)} tensors"
    return repr(one)


def _comparable(one: Any) -> Any:
    match one:
        case Tensor():
            return (one.dtype, one.shape, one.tolist())
        case Mapping():
            return {name: _comparable(tensor) for name, tensor in one.items()}
    return one


def _tensors(one: Checkpoint, names: Sequence[str], count: int) -> list[Tensor]:
    """The tensors of a checkpoint with these names; of a tensor, itself."""
    match one:
        case str():
            return _read(Path(one), names)
        case Mapping():
            return [one[name] if name in one else _missing(one, name, one) for name in names]
    if count > 1:
        raise SpecError(f"mixture: got the checkpoint {_described(one)} for {count} weights; expected a state dict or a path")
    try:
        return [one if isinstance(one, Tensor) else torch.tensor(one, dtype=torch.float64)]
    except ValueError as error:
        raise SpecError(f"mixture: got a checkpoint of nested lists that are no tensor: {error}") from error


def _missing(one: Checkpoint, name: str, there: Mapping[str, Any] | Sequence[str]) -> Tensor:
    near = get_close_matches(name, list(there), 3)
    hint = f"did you mean {' or '.join(near)}? " if near else f"it has {', '.join(list(there)[:5]) or 'no tensors'}; "
    raise SpecError(f"mixture: no tensor {name!r} in the checkpoint {_described(one)}; {hint}type names=[...]")


def _read(path: Path, names: Sequence[str]) -> list[Tensor]:
    """The tensors of a file with these names; others are not read where the format allows."""
    if not path.is_file():
        raise SpecError(f"mixture: no file {str(path)!r}; expected the path of a safetensors or torch file")
    if path.suffix == ".safetensors":
        try:
            from safetensors import safe_open
        except ImportError as error:
            raise missing_extra("safetensors", "safetensors", "to read safetensors files") from error
        with safe_open(path, framework="pt") as file:
            there = list(file.keys())
            return [file.get_tensor(name) if name in there else _missing(str(path), name, there) for name in names]
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise SpecError(f"mixture: {str(path)!r} is no file of tensors only: {str(error).splitlines()[0]}") from error
    if not isinstance(state, Mapping):
        raise SpecError(f"mixture: {str(path)!r} holds a {type(state).__name__}; expected a state dict (name -> tensor)")
    there = [name for name, tensor in state.items() if isinstance(tensor, Tensor)]
    return [state[name] if name in there else _missing(str(path), name, there) for name in names]


def _check(one: Checkpoint, tensor: Tensor, weight: Tensor) -> None:
    """Refuse a tensor that cannot be an ingredient of this weight."""
    if tensor.shape != weight.shape:
        raise SpecError(
            f"mixture: got a tensor of shape {shape_text(tensor)} from the checkpoint {_described(one)} for a weight of shape "
            f"{shape_text(weight)}; expected the same shape"
        )
    if not tensor.is_floating_point():
        raise SpecError(f"mixture: got a tensor of dtype {tensor.dtype} from the checkpoint {_described(one)}; expected floats")
    if not tensor.isfinite().all():
        raise SpecError(f"mixture: the checkpoint {_described(one)} holds NaN or infinity; repair it first")
