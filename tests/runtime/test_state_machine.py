"""Random training scripts: after every step a transformed model is what an uncached one is."""

from __future__ import annotations

from collections import Counter

import pytest
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
