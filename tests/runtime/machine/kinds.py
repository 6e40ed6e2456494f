"""The subjects: a transformed model each, with its oracle."""

from __future__ import annotations

import copy
from typing import Any

import torch
from runtime.machine.compare import Tolerance
from runtime.machine.models import DTYPE, HEADS, Antisymmetric, Handwritten, Heads, N, Net, Pair, Two, noise, rotation
from runtime.machine.oracles import HeadsOracle, NetOracle, NoiseOracle, Oracle, SpectralOracle, own
from runtime.machine.script import Kind
from runtime.machine.world import World

import fxparam as fxp


def oracle_world(oracle: Oracle, dtype: torch.dtype = DTYPE) -> World:
    return World(oracle, own, lambda model, name: model.weights()[name], lambda model: model.weights(), dtype)


def net_kind(dtype: torch.dtype = DTYPE, **options: Any) -> Kind:
    """Maps of the catalogue, a chain of weights, two weights of one latent."""
    recompute = options.get("recompute", False)

    def build(seed: int) -> tuple[World, World]:
        torch.manual_seed(seed)
        spec = {
            "orth.weight": fxp.orthogonal(map="cayley"),
            "norm.weight": fxp.weight_norm(),
            "enc.weight": fxp.weight_norm(),
            "dec.weight": fxp.ref("enc.weight") >> fxp.transpose(),
            fxp.joint("left.weight", "right.weight"): fxp.custom(Pair(), init=0.3 * torch.randn(12, dtype=DTYPE).to(dtype)),
        }
        model = fxp.transform(Net().to(dtype), spec, **options)
        return World(model, dtype=dtype), oracle_world(NetOracle(model, recompute=recompute), dtype)

    weights = ("orth.weight", "norm.weight", "enc.weight", "dec.weight", "left.weight", "right.weight")
    assignable = {
        "orth.weight": rotation,
        "norm.weight": lambda seed: noise(seed, 3, N),
        "enc.weight": lambda seed: noise(seed, 3, N),
    }
    if dtype == DTYPE:
        return Kind(build, weights, assignable, recompute=recompute)
    return Kind(build, weights, recompute=recompute, tolerance=Tolerance(1e-5, 1e-4), rough=Tolerance(1e-3, 1e-2))


def handwritten_kind(**options: Any) -> Kind:
    """An empty spec. The oracle is the given model."""

    def build(seed: int) -> tuple[World, World]:
        torch.manual_seed(seed)
        net = Handwritten().double()
        return World(fxp.transform(copy.deepcopy(net), **options)), World(net)

    return Kind(build, parts=("mix", "first"))


def heads_kind(**options: Any) -> Kind:
    """Weights that share autograd nodes; some of their graphs save nothing."""

    def build(seed: int) -> tuple[World, World]:
        torch.manual_seed(seed)
        spec = {
            f"heads.{number}.weight": fxp.custom(Antisymmetric(), init=noise(number, 2, 2))
            if number % 8 == 0
            else fxp.weight_norm()
            for number in range(HEADS)
        }
        model = fxp.transform(Heads().double(), spec, **options)
        return World(model), oracle_world(HeadsOracle(model))

    return Kind(build, tuple(f"heads.{number}.weight" for number in range(HEADS)))


def spectral_kind(**options: Any) -> Kind:
    """Maps with a state."""

    def build(seed: int) -> tuple[World, World]:
        torch.manual_seed(seed)
        model = fxp.transform(Two().double(), {"*.weight": fxp.spectral_norm()}, **options)
        return World(model), oracle_world(SpectralOracle(model))

    return Kind(build, ("first.weight", "second.weight"), stateful=True, taps=())


def noise_kind(**options: Any) -> Kind:
    """Random numbers, drawn with the weights."""

    def build(seed: int) -> tuple[World, World]:
        torch.manual_seed(seed)
        drawn = fxp.noise(std=NoiseOracle.STD, resample="step")
        spec = {"first.weight": drawn, "second.weight": fxp.weight_norm() >> drawn}
        model = fxp.transform(Two().double(), spec, **options)
        return World(model), oracle_world(NoiseOracle(model))

    return Kind(build, ("first.weight", "second.weight"), stateful=True, taps=())


KINDS = {
    "net-live": net_kind(trace="live"),
    "net-auto": net_kind(trace="auto"),
    "net-recompute": net_kind(trace="auto", recompute=True),
    "half-live": net_kind(torch.float32, trace="live"),
    "half-auto": net_kind(torch.float32, trace="auto"),
    "handwritten-auto": handwritten_kind(trace="auto"),
    "heads-live": heads_kind(trace="live"),
    "heads-auto": heads_kind(trace="auto"),
    "spectral-live": spectral_kind(trace="live"),
    "spectral-auto": spectral_kind(trace="auto"),
    "noise-live": noise_kind(trace="live"),
    "noise-auto": noise_kind(trace="auto"),
}
