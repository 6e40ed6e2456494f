"""Weights and latents of a transformed model by name: reading, assigning, sampling, freezing."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from fxparam.errors import ImageError, SpecError
from fxparam.program import Site
from fxparam.spec.resolve import nearest
from fxparam.tracer.looking import retracted


class WeightAccess:
    """The part of ``ParametrizedModule`` that takes names of weights."""

    _fxp_runtime: Any
    _fxp_live: Any

    @property
    def sites(self) -> tuple[Site, ...]:
        """What was parametrized, and how."""
        return self._fxp_runtime.present_sites()

    def weights(self) -> dict[str, Tensor]:
        """The computed weights by dotted name, with gradient if grad mode is on."""
        with self._fxp_runtime.forward():
            return {name: self._fxp_runtime.read_weight(name) for site in self.sites for name in site.names}

    def latents(self) -> dict[str, Tensor]:
        """The trainable tensors behind the weights by dotted name; the ones an optimizer moves."""
        return {name: self._fxp_runtime.tensor(name) for site in self.sites for name in site.latents}

    def assign(self, name: str, tensor: Tensor, *, project: bool = False) -> None:
        """Set a weight: its latents become ``right_inverse(tensor)``.

        Args:
            name: the dotted name of a computed weight.
            tensor: the new value, of the weight's shape.
            project: first move ``tensor`` to a nearby weight that the parametrization can produce.

        Raises:
            ImageError: the parametrization cannot produce ``tensor``; nothing was changed.
            SpecError: no weight of this name is computed.
        """
        self._site(name)
        if not isinstance(tensor, Tensor):
            raise SpecError(f"got {type(tensor).__name__} for {name}, expected a tensor")
        self._fxp_runtime.write_weight(name, tensor, project=project)

    def sample(self, name: str, *, generator: torch.Generator | None = None) -> Tensor:
        """A random weight from the distribution its parametrization documents; the model is not changed.

        Raises:
            ImageError: the parametrization has no distribution.
            SpecError: no weight of this name is computed.
        """
        site = self._site(name)
        steps: list[Any] = list(self._fxp_live.get_submodule(site.home))
        # The first map draws from its distribution, the others map on: what comes out is in the image of the chain.
        if not site.latents or not steps or not hasattr(steps[0], "sample"):
            raise ImageError(f"{name} ({site.declaration}) has no distribution to sample from")
        with torch.no_grad():
            value = steps[0].sample(generator=generator) if generator is not None else steps[0].sample()
            for step in steps[1:]:
                value = step(value)
        if isinstance(value, Tensor):
            return value
        return value[next(at for at, aliases in enumerate(site.aliases) if name in aliases)]

    def freeze(self, pattern: str = "*") -> list[str]:
        """Stop training what is behind the weights whose name fits the glob: latents, and parameters of their maps.

        Returns:
            The names of the tensors.
        """
        return self._set_trainable(pattern, False)

    def unfreeze(self, pattern: str = "*") -> list[str]:
        """Train what is behind the weights whose name fits the glob: latents, and parameters of their maps.

        Returns:
            The names of the tensors.
        """
        return self._set_trainable(pattern, True)

    def retract(self, pattern: str = "*") -> None:
        """Set the latents to ``right_inverse(forward(latents))``, against drift; the weights stay.

        Of a chain of maps the first is taken, which has the latents.

        Raises:
            ImageError: a map has no right inverse. Sites before it in order are retracted, it and later ones are not.
        """
        for site in self._matching(pattern):
            if not site.latents:
                continue
            module: Any = self._fxp_live.get_submodule(site.home)
            try:
                with torch.no_grad():
                    if len(module) > 1:
                        latents = retracted(module)
                    else:
                        values = self._fxp_runtime.steady_values(site)
                        latents = module.right_inverse(values if len(values) > 1 else values[0])
                    module.set_latents(latents if isinstance(latents, tuple) else (latents,))
            except ImageError as error:
                raise ImageError(f"{', '.join(site.names)}: {error}") from error
        self.invalidate()

    def invalidate(self, *, traces: bool = False) -> None:
        """Compute the weights anew at the next read: after a write that nothing can see (``p.data.add_``, NumPy views).

        Args:
            traces: also trace the maps and the model anew.
        """
        self._fxp_runtime.invalidate(traces=traces)

    def _set_trainable(self, pattern: str, flag: bool) -> list[str]:
        names: dict[str, None] = {}
        for site in self._matching(pattern):
            home = self._fxp_live.get_submodule(site.home)
            names |= dict.fromkeys((*site.latents, *(f"{site.home}.{name}" for name, _ in home.named_parameters())))
        for name in names:
            self._fxp_runtime.tensor(name).requires_grad_(flag)
        return list(names)

    def _matching(self, pattern: str) -> list[Site]:
        found = [s for s in self.sites if any(fnmatchcase(alias, pattern) for aliases in s.aliases for alias in aliases)]
        if not found and not self.sites:
            raise SpecError("no weight of this model is computed; give transform(model, spec) a spec")
        if not found:
            raise SpecError(f"no computed weight fits {pattern!r}; {nearest(pattern, self._names())}")
        return found

    def _site(self, name: str) -> Site:
        for site in self.sites:
            if any(name in aliases for aliases in site.aliases):
                return site
        raise SpecError(f"{name!r} is not a computed weight; {nearest(name, self._names())}")

    def _names(self) -> Iterator[str]:
        return (name for site in self.sites for name in site.names)
