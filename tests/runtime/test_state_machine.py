"""Random training scripts: after every step a transformed model is what an uncached one is."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from runtime.machine.kinds import KINDS
from runtime.machine.rules import Machine
from runtime.machine.script import Script

# Chosen by `make fuzz` like the tests under @given.
pytestmark = pytest.mark.hypothesis

LARGE = settings().max_examples > 100


# Scripts write to weights as well, and go on as if nothing had happened.
@pytest.mark.filterwarnings("ignore:.* was written in place:RuntimeWarning")
@pytest.mark.parametrize("name", KINDS)
def test_as_uncached(name: str, tally: Counter[str]) -> None:
    machine: type[Script] = type("Machine", (Machine,), {"kind": KINDS[name]})
    before = Script.scripts, Script.steps
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=settings().max_examples // 40 if LARGE else 4,
                stateful_step_count=50 if LARGE else 30,
                suppress_health_check=list(HealthCheck),
                report_multiple_bugs=False,
                phases=[Phase.generate, Phase.shrink],
            ),
        )
    finally:
        tally["scripts"] += Script.scripts - before[0]
        tally["steps"] += Script.steps - before[1]
        tally["kinds"] += 1
    assert Script.steps > before[1]


# In the middle of a forward: one after the other, what the scripts leave out.


def outcome_of_tap(name: str, how: str, at: int) -> None:
    machine = type("Machine", (Machine,), {"kind": KINDS[name]})()
    machine.do("forward", "grad", 0)
    machine.do("backward", -1, -1, False, False, False)
    machine.do("tapped", how, at, 1)
    machine.teardown()


@pytest.mark.parametrize("how", ["copy", "inference", "set", "fused step"])
@pytest.mark.parametrize("name", ["net-live", "handwritten-auto"])
def test_a_read_after_a_write_is_fresh(name: str, how: str) -> None:
    for at in range(0, 10, 2):
        outcome_of_tap(name, how, at)


@pytest.mark.parametrize("how", ["copy", "inference", "set", "fused step"])
def test_a_second_read_in_a_graph_is_fresh(how: str) -> None:
    for at in range(10):
        outcome_of_tap("net-auto", how, at)


@pytest.mark.parametrize("name", ["net-live", "handwritten-auto"])
def test_a_read_after_new_data_is_fresh(name: str) -> None:
    for at in range(10):
        outcome_of_tap(name, "data", at)


def test_dtype_of_a_map_under_autocast() -> None:
    subject, _ = KINDS["half-live"].build(0)
    site: Any = subject.model.get_submodule("orth.parametrizations.weight")
    with torch.autocast("cpu", torch.bfloat16):
        assert subject.read(subject.model, "orth.weight").dtype == site[0](site.original).dtype
