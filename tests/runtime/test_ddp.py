"""Two processes with gloo: DistributedDataParallel with and without deferral, and FSDP2.

The file is also the program that the two processes run. Each case runs there once and leaves its gradients in a file; the
tests compare them with one process that sees all batches, under ``torch.nn.utils.parametrize``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from runtime.models import ThreeLayers, three_parametrized_layers
from runtime.oracles import DTYPE, same
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fxparam as fxp

N, WORLD = 4, 2
ALL = ("abc",) * 4
Steps = Callable[[fxp.ParametrizedModule, Any, list[tuple[Tensor, str]]], None]


def plain() -> ThreeLayers:
    torch.manual_seed(0)
    return three_parametrized_layers(N)


class Standardized(nn.Module):
    """Weight arithmetic of the forward's own."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(N, N, dtype=DTYPE))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.w / self.w.norm(dim=1, keepdim=True))


def standardized() -> Standardized:
    torch.manual_seed(0)
    return Standardized()


def batches(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(size, N, generator=generator, dtype=DTYPE) for size in (3, 1, 4, 2)]


# --- ways to run the micro-batches of one step


def each_synchronizes(model: Any, ddp: Any, work: list[tuple[Tensor, str]]) -> None:
    for x, path in work:
        ddp(x, path).square().sum().backward()


def no_sync(model: Any, ddp: Any, work: list[tuple[Tensor, str]]) -> None:
    with ddp.no_sync():
        each_synchronizes(model, ddp, work[:-1])
    each_synchronizes(model, ddp, work[-1:])


def deferred(model: Any, ddp: Any, work: list[tuple[Tensor, str]]) -> None:
    with model.defer_backward():
        no_sync(model, ddp, work)


def deferred_each_synchronizes(model: Any, ddp: Any, work: list[tuple[Tensor, str]]) -> None:
    with model.defer_backward():
        each_synchronizes(model, ddp, work)


def last_after_the_block(model: Any, ddp: Any, work: list[tuple[Tensor, str]]) -> None:
    with ddp.no_sync(), model.defer_backward():
        each_synchronizes(model, ddp, work[:-1])
    each_synchronizes(model, ddp, work[-1:])


def block_around_the_others(model: Any, ddp: Any, work: list[tuple[Tensor, str]]) -> None:
    with model.defer_backward(), ddp.no_sync():
        losses = [ddp(x, path).square().sum() for x, path in work[:-1]]
    for loss in losses:
        loss.backward()
    each_synchronizes(model, ddp, work[-1:])


def deferred_compiled(model: Any, ddp: Any, work: list[tuple[Tensor, str]]) -> None:
    model.compile(backend="eager")
    deferred(model, ddp, work)


def last_backward_after_the_block(model: Any, ddp: Any, work: list[tuple[Tensor, str]]) -> None:
    with model.defer_backward():
        with ddp.no_sync():
            each_synchronizes(model, ddp, work[:-1])
        loss = ddp(*work[-1]).square().sum()
    loss.backward()


def one_backward_of_all(model: Any, ddp: Any, work: list[tuple[Tensor, str]]) -> None:
    with model.defer_backward():
        with ddp.no_sync():
            losses = [ddp(x, path).square().sum() for x, path in work[:-1]]
        torch.stack([*losses, ddp(*work[-1]).square().sum()]).sum().backward()


@dataclass(frozen=True)
class Case:
    """One way to train for some steps.

    Attributes:
        run: the micro-batches of one step.
        paths: which layers each micro-batch uses.
        options: of DistributedDataParallel.
        backwards: evaluations of the prologue's backward in each step.
        refused: whether each step must raise.
        goes_on: whether there can be a next step after that. DistributedDataParallel itself refuses one after a
            synchronizing forward without its backward.
    """

    run: Steps
    paths: tuple[str, ...] = ALL
    options: dict[str, Any] = field(default_factory=dict)
    backwards: int = 2
    refused: bool = False
    goes_on: bool = True


UNUSED = {"find_unused_parameters": True}
VIEW = {"gradient_as_bucket_view": True}
STATIC = {"static_graph": True}
CASES = {
    "each": Case(each_synchronizes, backwards=8),
    "each, static": Case(each_synchronizes, options=STATIC, backwards=8),
    "no_sync": Case(no_sync, backwards=8),
    "no_sync, unused": Case(no_sync, options=UNUSED, backwards=8),
    "no_sync, view": Case(no_sync, options=VIEW, backwards=8),
    "deferred": Case(deferred),
    "deferred, unused": Case(deferred, options=UNUSED),
    "deferred, view": Case(deferred, options=VIEW),
    "deferred, compiled": Case(deferred_compiled),
    "deferred, each synchronizes": Case(deferred_each_synchronizes, backwards=8),
    "deferred, each synchronizes, static": Case(deferred_each_synchronizes, options=STATIC, backwards=8),
    "last after the block": Case(last_after_the_block, backwards=4),
    "last after the block, unused": Case(last_after_the_block, options=UNUSED, backwards=4),
    "last after the block, view": Case(last_after_the_block, options=VIEW, backwards=4),
    "losses of the block after it": Case(block_around_the_others, backwards=8),
    "no_sync, last loss reaches one weight": Case(no_sync, ("abc", "ab", "a", "b"), UNUSED, backwards=6),
    "last loss reaches one weight": Case(deferred, ("abc", "ab", "a", "b"), UNUSED),
    "only the last reaches weights": Case(deferred, ("c", "c", "c", "ab"), UNUSED),
    "no loss reaches weights": Case(deferred, ("c", "c", "c", "c"), UNUSED, backwards=0),
    "no_sync, last loss reaches no weight": Case(no_sync, ("abc", "ab", "a", "c"), UNUSED, backwards=5),
    "last loss reaches no weight": Case(deferred, ("abc", "ab", "a", "c"), UNUSED, refused=True),
    "last backward after the block": Case(last_backward_after_the_block, refused=True, goes_on=False),
    "one backward of all": Case(one_backward_of_all, refused=True),
}
STEPS = 2


# --- in the two processes


def run_case(case: Case, rank: int) -> dict[str, Any]:
    model = fxp.transform(plain())
    ddp = DistributedDataParallel(model, **case.options)
    work = list(zip(batches(rank), case.paths, strict=True))
    errors, gradients = [], []
    for _ in range(STEPS if case.goes_on else 1):
        model.zero_grad()
        try:
            case.run(model, ddp, work)
        except fxp.DeferralError as error:
            errors.append(str(error))
        gradients.append({name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()})
        model.invalidate()
    after = None
    if case.refused and case.goes_on:
        model.zero_grad()
        no_sync(model, ddp, [(x, "abc") for x, _ in work])
        after = {name: p.grad for name, p in model.named_parameters()}
    return {"errors": errors, "gradients": gradients, "after": after, "backwards": model.stats.backwards}


SHARDED: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], list[nn.Module]], bool, bool]] = {
    # how the net is made, what is sharded besides the whole, a forward before training, deferral
    "whole": (plain, lambda m: [], False, False),
    "layer without computed weight": (plain, lambda m: [m.c], False, False),
    "layer with computed weight": (plain, lambda m: [m.a], False, False),
    "hoisted": (standardized, lambda m: [], False, False),
    "whole, deferred": (plain, lambda m: [], False, True),
    "whole, deferred after a forward": (plain, lambda m: [], True, True),
    "hoisted, deferred": (standardized, lambda m: [], False, True),
    "hoisted, deferred after a forward": (standardized, lambda m: [], True, True),
}


def run_sharded(name: str, rank: int) -> dict[str, Any]:
    make, parts, before, defer = SHARDED[name]
    model: Any = fxp.transform(make())
    mesh = init_device_mesh("cpu", (WORLD,))
    x = batches(rank)[0]
    try:
        for part in (*parts(model), model):
            fully_shard(part, mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(STEPS):
            if before:
                with torch.no_grad():
                    model(x)
            if defer:
                with model.defer_backward():
                    model(x).square().sum().backward()
            else:
                model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        parameters = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    except Exception as error:
        return {"error": type(error).__name__, "text": str(error)}
    return {"error": None, "parameters": parameters, "refreshes": model.stats.refreshes}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(folder / "store").as_uri(), rank=rank, world_size=WORLD)
    results = {name: run_case(case, rank) for name, case in CASES.items()}
    results |= {f"fsdp: {name}": run_sharded(name, rank) for name in SHARDED}
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


# --- the tests


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        outputs = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(outputs)[-6000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def reference(paths: tuple[str, ...]) -> dict[str, Tensor | None]:
    """The gradients of one process that sees the batches of both ranks; ranks average."""
    oracle = plain()
    for rank in range(WORLD):
        for x, path in zip(batches(rank), paths, strict=True):
            (oracle(x, path).square().sum() / WORLD).backward()
    return {name: p.grad for name, p in oracle.named_parameters()}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.refused])
def test_gradients_are_those_of_one_process(name: str, results: list[dict[str, Any]]) -> None:
    case, want = CASES[name], reference(CASES[name].paths)
    for rank in results:
        assert rank[name]["errors"] == []
        for gradients in rank[name]["gradients"]:
            same(gradients, want, 1e-12)
        assert rank[name]["backwards"] == STEPS * case.backwards
    for one, other in zip(results[0][name]["gradients"], results[1][name]["gradients"], strict=True):
        assert all(one[key] is None or torch.equal(one[key], other[key]) for key in one), "the ranks diverge"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.refused])
def test_what_ranks_would_add_alone_is_refused(name: str, results: list[dict[str, Any]]) -> None:
    want = reference(ALL)
    for rank in results:
        assert len(rank[name]["errors"]) == (STEPS if CASES[name].goes_on else 1)
        for text in rank[name]["errors"]:
            assert "would be added on this rank only" in text
            assert "the last loss of the block must depend on a computed weight" in text
            assert "its backward must come after all others and inside the block" in text
        if CASES[name].goes_on:
            # The reducer is not left in the middle: the next step is right.
            same(rank[name]["after"], want, 1e-12)


@pytest.mark.parametrize("name", [*list(SHARDED)[:2], "hoisted"])
def test_fsdp_trains_like_one_process(name: str, results: list[dict[str, Any]]) -> None:
    oracle: Any = SHARDED[name][0]()
    optimizer = torch.optim.SGD(oracle.parameters(), 0.1)
    for _ in range(STEPS):
        for rank in range(WORLD):
            (oracle(batches(rank)[0]).square().sum() / WORLD).backward()
        optimizer.step()
        optimizer.zero_grad()
    for result in results:
        found = result[f"fsdp: {name}"]
        assert found["error"] is None, found["text"]
        same(found["parameters"], {key: p.detach() for key, p in oracle.named_parameters()}, 1e-12)
        assert found["refreshes"] == STEPS


@pytest.mark.parametrize("name", ["layer with computed weight"])
def test_fsdp_of_a_layer_with_a_computed_weight_is_refused(name: str, results: list[dict[str, Any]]) -> None:
    for result in results:
        found = result[f"fsdp: {name}"]
        assert found["error"] is not None and "fully_shard" in found["text"], found


@pytest.mark.parametrize(
    "name",
    [name for name in SHARDED if "deferred" in name],
)
def test_fsdp_with_deferral_is_refused(name: str, results: list[dict[str, Any]]) -> None:
    for result in results:
        found = result[f"fsdp: {name}"]
        assert found["error"] == "DeferralError", found
        assert found["text"] == (
            "defer_backward() with fully_shard (FSDP2): the latents are sharded and freed after each backward; leave "
            "defer_backward() out, the weights are still computed once per forward"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
