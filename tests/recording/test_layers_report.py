"""What the report says of recorded modules, what runs as a graph from which call on, and calls that fail or meet."""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
import torch
from recording.common import (
    CALL,
    SMALL,
    WAYS,
    Base,
    Call,
    Case,
    Host,
    N,
    build,
    cases,
    check,
    compare,
    doubles,
    observe,
    seeing,
    small,
    step,
    transformed,
    x,
)
from torch import Tensor, nn

import fxparam as fxp


class Mixes(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x)


class Layered(nn.Module):
    """A part that is a graph, one that prints, and one without weight arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.loud = Mixes(), Loud()
        self.plain = nn.Sequential(nn.Linear(N, N), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.loud(self.good(x)))


class Loud(Base):
    def __init__(self) -> None:
        super().__init__()
        self.part = Mixes()

    def forward(self, x: Tensor) -> Tensor:
        print("loud")
        return self.part(x)


class Fragile(Base):
    """Raises where an input says so, in the middle of it."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Mixes()

    def forward(self, x: Tensor, error: type[BaseException] | None = None) -> Tensor:
        out = self.part(x)
        if error is not None:
            raise error("said so")
        return self.mixed(out)


class Catches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Fragile()

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.part(x, ValueError)
        except ValueError:
            return self.part(x)


LAYERED, MIXES = Case("layered", Layered), Case("mixes", Mixes)
FRAGILE = Case("fragile", Fragile, graph=None)


def raising(error: type[BaseException]) -> Call:
    return Call(lambda: (x(), error), raises=(error,))


ERRORS = [
    Case(
        "raises first", Fragile, (raising(ValueError), CALL, CALL, raising(ValueError), raising(ValueError), step, CALL, SMALL)
    ),
    Case("raises later", Fragile, (CALL, CALL, raising(ValueError), CALL, step, raising(ValueError), CALL, CALL)),
    Case("interrupted", Fragile, (raising(KeyboardInterrupt), CALL, CALL, raising(KeyboardInterrupt), CALL, step, CALL)),
    Case("wrong shape", Mixes, (CALL, CALL, Call(lambda: (torch.randn(5, 3),), raises=(RuntimeError,)), CALL, step, CALL)),
    Case("wrong shape first", Mixes, (Call(lambda: (torch.randn(5, 3),), raises=(RuntimeError,)), CALL, CALL, CALL)),
    Case("catches", Catches, graph=None),
]


@pytest.mark.parametrize(("case", "way"), cases(ERRORS))
def test_errors_are_the_models_own_and_leave_it_usable(case: Case, way: str) -> None:
    check(case, way)
    assert sys.getprofile() is None


@pytest.mark.parametrize("trace", ["auto", "record"])
@doubles()
def test_each_module_gets_its_layer_and_the_reason(trace: str) -> None:
    model = transformed(LAYERED, f"region-{trace}")
    assert model.report.body == "live"
    for _ in range(3):
        model(x())
    report = model.report
    assert report.body == "regions"
    for path, layer in [
        ("", "live"),
        ("inner", "live"),
        ("inner.good", "record"),
        ("inner.loud", "live"),
        ("inner.loud.part", "record"),
    ]:
        assert (report.layer_of(path).path, report.layer_of(path).layer) == (path, layer)
    assert "print() at test_layers_report.py" in report.layer_of("inner.loud").reason
    assert "item" in report.layer_of("").reason
    assert "common.py" in report.layer_of("").reason
    assert report.layer_of("inner.good.lin").path == "inner.good"
    worth = report.layer_of("inner.plain").reason
    assert (worth == "") == (trace == "record"), worth
    assert "inner.good (Mixes): record" in str(report)


@pytest.mark.parametrize("way", WAYS)
@doubles()
def test_the_call_after_the_recorded_one_runs_the_graphs(way: str) -> None:
    model = transformed(MIXES, way)
    model(x())
    with seeing(Mixes.forward.__code__) as ran:
        model(x())
    assert not ran


@pytest.mark.parametrize("way", WAYS)
@doubles()
def test_graphs_run_for_each_kind_of_call_that_has_been_seen(way: str) -> None:
    model = transformed(MIXES, way)
    kinds = [(mode, grad, make) for mode in (True, False) for grad in (True, False) for make in (x, small)]

    def ran(count: int) -> int:
        total = 0
        for mode, grad, make in kinds:
            model.train(mode)
            for _ in range(count):
                with torch.set_grad_enabled(grad), seeing(Mixes.forward.__code__) as calls:
                    if count > 1:
                        # Nothing is recorded under a profiler.
                        sys.setprofile(None)
                    model(make())
                total += len(calls)
        return total

    ran(3)
    assert ran(1) == 0


@pytest.mark.parametrize("way", WAYS)
@doubles()
def test_a_profiler_stays_and_nothing_is_recorded_under_it(way: str) -> None:
    model = transformed(MIXES, way)
    eager = build(MIXES, region=way.startswith("region"), parametrized=True)
    seen: list[str] = []

    def profiler(frame: Any, event: str, arg: Any) -> None:
        seen.append(event)

    for number in range(4):
        sys.setprofile(profiler if number % 2 == 0 else None)
        try:
            got = observe(model, CALL, number)
            assert sys.getprofile() is (profiler if number % 2 == 0 else None)
        finally:
            sys.setprofile(None)
        compare(got, observe(eager, CALL, number), str(number))
    assert seen


@pytest.mark.parametrize("way", WAYS)
@doubles()
def test_a_tracer_of_lines_stays(way: str) -> None:
    model = transformed(MIXES, way)
    eager = build(MIXES, region=way.startswith("region"), parametrized=True)
    before = sys.gettrace()

    def tracer(frame: Any, event: str, arg: Any) -> Any:
        return tracer

    sys.settrace(tracer)
    try:
        for number in range(3):
            compare(observe(model, CALL, number), observe(eager, CALL, number), str(number))
            assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("way", WAYS)
@doubles()
def test_threads_that_call_a_model_while_it_is_recorded(way: str) -> None:
    model = transformed(MIXES, way)
    eager = build(MIXES, region=way.startswith("region"), parametrized=True)
    inputs = [torch.randn(3 + n % 3, N) for n in range(12)]
    found: dict[int, Any] = {}
    barrier = threading.Barrier(4)

    def work(first: int) -> None:
        barrier.wait()
        for number in range(first, len(inputs), 4):
            try:
                found[number] = model(inputs[number]).detach()
            except BaseException as error:
                found[number] = error

    for _ in range(3):
        threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number, value in enumerate(inputs):
            assert isinstance(found[number], Tensor), found[number]
            torch.testing.assert_close(found[number], eager(value).detach(), rtol=1e-12, atol=1e-12)
        step(model)
        barrier.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
@doubles()
def test_export_and_compilation_after_a_recording(way: str) -> None:
    model = transformed(MIXES, way)
    eager = build(Case("mixes", Mixes), region=False, parametrized=True)
    for _ in range(3):
        model(x())
    value = x()
    if way.startswith("model"):
        program = torch.export.export(model, (value,))
        torch.testing.assert_close(program.module()(value), eager(value), rtol=1e-12, atol=1e-12)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(value), eager(value), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(value), eager(value), rtol=1e-12, atol=1e-12)


@doubles()
def test_a_model_without_weight_arithmetic_runs_as_python_and_says_so() -> None:
    model = fxp.transform(Host(nn.Sequential(nn.Linear(N, N), nn.Tanh())).double())
    for _ in range(2):
        model(x())
    assert model.report.body == "live"
    assert "no weight arithmetic" in model.report.layer_of("inner").reason
