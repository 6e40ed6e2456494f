"""How many random training scripts ``torch.nn.utils.parametrize.cached()`` gets wrong, and how many fxparam does.

The scripts are those of the tests (``tests/runtime/machine/``) without what only fxparam has; the oracle is the same model
outside of any ``cached()``. Three ways to use ``cached()``: one block around the whole script, one for each optimizer step,
one in each forward.

python benchmarks/cached_peer.py [scripts]
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fxparam as fxp

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from runtime.machine.compare import Mismatch
from runtime.machine.models import N, Net
from runtime.machine.rules import Machine
from runtime.machine.script import Kind
from runtime.machine.world import World

STEPS = 40
DEBUG = "-v" in sys.argv
NAMES = ("orth.weight", "norm.weight", "enc.weight")
ENDS_A_STEP = ("step", "lbfgs", "step_by_hand")


class Peer(Net):
    """The net of the tests, as far as ``torch.nn.utils.parametrize`` can say it."""

    def __init__(self) -> None:
        super().__init__()
        parametrizations.orthogonal(self.orth, orthogonal_map="cayley")
        parametrizations.weight_norm(self.norm)
        parametrizations.weight_norm(self.enc)
        del self.dec

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        enc = self.enc(x)
        hidden = torch.tanh(self.orth(self.tap(torch.tanh(self.orth(x)))))
        return self.norm(hidden), enc, F.linear(x[:, :3], self.enc.weight.mT), self.left(x), self.right(hidden)


class PeerByCall(Peer):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with parametrize.cached():
            return super().forward(x)


def by_call(net: nn.Module) -> nn.Module:
    new = PeerByCall().double()
    new.load_state_dict(net.state_dict())
    return new


def read_all(model: nn.Module) -> dict[str, Tensor]:
    return {name: attrgetter(name)(model) for name in NAMES}


def worlds(subject: Callable[[nn.Module], nn.Module], scope: str) -> Callable[[int], tuple[World, World]]:
    def build(number: int) -> tuple[World, World]:
        torch.manual_seed(number)
        net = Peer().double()
        model = subject(copy.deepcopy(net))
        world = World(model, read_all=read_all) if not scope else Cached(model, read_all=read_all)
        world.scope = scope  # type: ignore[attr-defined]
        return world, World(net, read_all=read_all)

    return build


class Cached(World):
    """A world whose actions run inside ``cached()``, left and entered again as ``scope`` says."""

    scope: str

    def run(self, action: str, *args: Any) -> Any:
        # The oracle shares the process, and so the cache, which is a global: it must not see this block.
        before = parametrize._cache_enabled, parametrize._cache
        parametrize._cache_enabled, parametrize._cache = 1, self.__dict__.setdefault("cache", {})
        try:
            return super().run(action, *args)
        finally:
            if self.scope == "step" and action in ENDS_A_STEP:
                parametrize._cache.clear()
            parametrize._cache_enabled, parametrize._cache = before


class Counted(Machine):
    """A script that stops at the first difference and notes of what kind it was."""

    found: ClassVar[Counter[str]]

    def __init__(self) -> None:
        super().__init__()
        self.wrong = ""

    def do(self, action: str, *args: Any, keeps: bool = False, reads: bool = False, autocast: bool | None = None) -> None:
        # Writing into a computed weight is asking for it, and modules under torch's parametrize do not pickle.
        if self.wrong or action == "write_weight":
            return
        args = ("deepcopy",) if action == "duplicate" else args
        try:
            super().do(action, *args, reads=reads)
        except Mismatch as mismatch:
            if DEBUG:
                print(mismatch)
            self.wrong = "an error" if "got error" in str(mismatch) else "silently"

    def teardown(self) -> None:
        super().teardown()
        self.found[self.wrong or "right"] += 1


def run(subject: Callable[[nn.Module], nn.Module], scope: str, scripts: int) -> Counter[str]:
    kind = Kind(worlds(subject, scope), NAMES)
    machine: Any = type("Machine", (Counted,), {"kind": kind, "found": Counter()})
    quiet = settings(
        max_examples=scripts,
        stateful_step_count=STEPS,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(seed(0)(machine), settings=quiet)
    return machine.found


def main() -> None:
    scripts = int(next(iter(a for a in sys.argv[1:] if a.isdigit()), 200))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{scripts} random scripts of up to {STEPS} actions on a model of {N} x {N}, torch {torch.__version__}\n")
    print("| subject | right | wrong without a word | an error that plain PyTorch does not raise |\n| --- | --- | --- | --- |")
    subjects: list[tuple[str, Callable[[nn.Module], nn.Module], str]] = [
        ("`cached()` around the script", lambda net: net, "script"),
        ("`cached()` around each optimizer step", lambda net: net, "step"),
        ("`cached()` around each forward", by_call, ""),
        ("`fxp.transform(net)`", fxp.transform, ""),
        ('`fxp.transform(net, trace="live")`', lambda net: fxp.transform(net, trace="live"), ""),
    ]
    for name, subject, scope in subjects:
        found = run(subject, scope, scripts)
        print(f"| {name} | {found['right']} | {found['silently']} | {found['an error']} |", flush=True)


if __name__ == "__main__":
    main()
