"""What every test starts from: fixed seeds, one torch thread, a hypothesis profile.

``FXPARAM_SEED`` sets the seed of torch, numpy and random before each test (default 0). ``FXPARAM_PROFILE`` picks the
hypothesis profile: ``ci`` is small and draws the same examples each time, ``large`` draws many (``make fuzz``). The
header of a run prints both, so that a failure can be had again.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from typing import Any

# Before torch is imported, and inherited by the processes that tests start: workers must not fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest
import torch

SEED = int(os.environ.get("FXPARAM_SEED", "0"))
PROFILE = os.environ.get("FXPARAM_PROFILE", "ci")

torch.set_num_threads(1)
# A slow machine is no failure, hence no deadline; the health check for slow data would be one by another name.
_patient = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True)
hypothesis.settings.register_profile("ci", _patient, max_examples=25, derandomize=True, database=None)
hypothesis.settings.register_profile("large", _patient, max_examples=2000)
hypothesis.settings.load_profile(PROFILE)


_TALLY = pytest.StashKey[Counter[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Begin to count."""
    config.stash[_TALLY] = Counter()


@pytest.fixture
def tally(pytestconfig: pytest.Config) -> Counter[str]:
    """What the state machine has done in this process; the run ends with the sum over all of them."""
    return pytestconfig.stash[_TALLY]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of xdist hands its counts over."""
    if hasattr(session.config, "workeroutput"):
        count: Counter[str] = session.config.stash[_TALLY]
        session.config.workeroutput["tally"] = dict(count)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker has ended, or crashed and left nothing."""
    count: Counter[str] = node.config.stash[_TALLY]
    for name, number in getattr(node, "workeroutput", {}).get("tally", {}).items():
        count[name] += number


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """One line for all random scripts."""
    count = config.stash[_TALLY]
    if count:
        terminalreporter.write_line(
            f"state machine: {count['scripts']} scripts, {count['steps']} steps, {count['kinds']} kinds"
        )


def pytest_report_header() -> str:
    """One line that says what a run depends on."""
    return f"fxparam: torch {torch.__version__}, FXPARAM_SEED={SEED}, FXPARAM_PROFILE={PROFILE}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start each test from the same random state, whatever ran before it."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
