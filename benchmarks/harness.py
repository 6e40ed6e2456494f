"""Timing contestants against each other in one run: interleaved rounds, medians with quartiles, ratios to one of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one contestant: median and quartiles over the rounds."""

    median: float
    low: float
    high: float


def race(contestants: Mapping[str, Callable[[], object]], *, rounds: int = 15, warmup: int = 3) -> dict[str, Timing]:
    """Time every contestant once a round, so that what disturbs the machine disturbs all of them."""
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(warmup + rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if number >= warmup:
                samples[name].append(1e3 * (time.perf_counter() - start))
    timings = {}
    for name, values in samples.items():
        low, median, high = statistics.quantiles(values, n=4)
        timings[name] = Timing(median, low, high)
    return timings


def table(title: str, timings: Mapping[str, Timing], floor: str) -> str:
    """The timings as Markdown, with ratios to the contestant ``floor``."""
    lines = [
        f"### {title}",
        "",
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s); medians of interleaved rounds, quartiles in brackets",
        "",
        f"| contestant | ms | ratio to {floor} |",
        "| --- | --- | --- |",
    ]
    for name, timing in timings.items():
        ratio = timing.median / timings[floor].median
        lines.append(f"| {name} | {timing.median:.2f} [{timing.low:.2f}, {timing.high:.2f}] | {ratio:.2f} |")
    return "\n".join(lines)
