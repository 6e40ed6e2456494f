"""Random training scripts: after every step a transformed model is what an uncached one is."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from runtime.machine import KINDS, Script

# Chosen by `make fuzz` like the tests under @given.
pytestmark = pytest.mark.hypothesis

LARGE = settings().max_examples > 100


@pytest.fixture(scope="session", autouse=True)
def _count(request: pytest.FixtureRequest) -> Iterator[None]:
    """Print how many steps were made; in a worker process as well."""
    yield
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nstate machine: {Script.scripts} scripts, {Script.steps} steps", file=sys.__stderr__)


# Scripts write to weights as well, and go on as if nothing had happened.
@pytest.mark.filterwarnings("ignore:.* was written in place:RuntimeWarning")
@pytest.mark.parametrize("name", KINDS)
def test_as_uncached(name: str) -> None:
    machine: type[Script] = type("Machine", (Script,), {"kind": KINDS[name]})
    before = Script.steps
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=settings().max_examples // 10 if LARGE else 8,
            stateful_step_count=50 if LARGE else 30,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            phases=[Phase.generate, Phase.shrink],
        ),
    )
    assert Script.steps > before
