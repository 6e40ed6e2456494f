"""Processes that are killed while they write: whatever the moment, the file is whole, the old one or the new one.

``helper`` below runs as a program of its own, which forks a child for each kill:

* *events*: the child kills itself (SIGKILL) at its n-th access to the folder, for every n: opening, renaming, removing and
  listing as Python's audit hooks report them, and each ``fsync`` before and after;
* *bytes*: the kernel kills it (SIGXFSZ) when a file would grow beyond n bytes, which is in the middle of a write;
* *times*: it is killed after some milliseconds of writing the two models in turns.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from onnx_ir import tensor_adapters

from fxparam.exporters import files
from fxparam.exporters.refit import refit_onnx

DEBRIS = re.compile(r"\.?\.m\.onnx(\.[0-9a-f]{16}\.data)?\.[0-9a-f]{16}\.tmp(\.[a-z0-9_]{8})?|m\.onnx\.[0-9a-f]{16}\.data")
SHAPES = {"w": (16, 16), "v": (16, 40), "b": (40,)}
"""Two weights that go beside the file, and one that stays in it."""


def weights(value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full(shape, value) for name, shape in SHAPES.items()}


def model(value: float) -> ir.Model:
    """``y = x w v + b``."""
    nodes = [("MatMul", ["x", "w"], ["h"]), ("MatMul", ["h", "v"], ["g"]), ("Add", ["g", "b"], ["y"])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size]) for name, size in (("x", 16), ("y", 40)))
    initial = [helper.make_tensor(n, TensorProto.FLOAT, s, torch.zeros(s).flatten().tolist()) for n, s in SHAPES.items()]
    graph = helper.make_graph([helper.make_node(*node) for node in nodes], "g", [x], [y], initial)
    proto = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    built = ir.serde.deserialize_model(proto)
    for name, tensor in weights(value).items():
        built.graph.initializers[name].const_value = tensor_adapters.TorchTensor(tensor, name)
    return built


def write(path: Path, value: float, external: bool) -> None:
    files.write_model(model(value), path, external=external, check=lambda file: onnx.checker.check_model(os.fspath(file)))


def refit(path: Path, value: float, external: bool) -> None:
    refit_onnx(path, weights(value))


def export(path: Path, value: float, external: bool) -> None:
    from fxparam.exporters.onnx import export_program

    layer = torch.nn.Linear(16, 40)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(value)
    args = (torch.zeros(1, 16),)
    export_program(torch.export.export(layer, args), path, reference=layer, args=args, verify=0, external_data=external)


ACTIONS: dict[str, Callable[[Path, float, bool], None]] = {"write": write, "refit": refit, "export": export}


def held(path: Path) -> float:
    """The one number that all weights of the file are, after checking that the file is whole."""
    onnx.checker.check_model(os.fspath(path), full_check=True)
    found = files.read_model(path).graph.initializers.values()
    numbers = {float(x) for value in found for x in value.const_value.numpy().flat}  # type: ignore[union-attr]
    assert len(found) >= 2 and len(numbers) == 1, f"a mixture: {numbers}"
    return numbers.pop()


# ---- the program that forks ------------------------------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_event(number: int, folder: Path) -> None:
    """Kill this process at its ``number``-th access to ``folder``, from 1."""
    left, inside, fsync = number, os.fspath(folder), os.fsync

    def tick(*_: object) -> None:
        nonlocal left
        left -= 1
        if not left:
            die()

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" or event.startswith(("os.", "shutil.")):
            paths = [os.fspath(a) for a in args if isinstance(a, str | os.PathLike)]
            if any(isinstance(p, str) and p.startswith(inside) for p in paths):
                tick()

    def flush(descriptor: Any) -> None:
        tick()
        fsync(descriptor)
        tick()

    sys.addaudithook(hook)
    os.fsync = flush  # type: ignore[assignment]


def die_at_byte(size: int) -> None:
    """Have the kernel kill this process when it writes beyond the first ``size`` bytes of any file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def forked(work: Callable[[], None], seconds: float | None = None) -> bool:
    """Run ``work`` in a child, killed after ``seconds``; whether it came to its end."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status <= 0, "the child failed by itself"
    assert status in (0, -signal.SIGKILL, -signal.SIGXFSZ), status
    return status == 0


def helper_program(folder: Path, action: str, external: bool, how: str, rounds: int) -> dict[str, int]:
    """Kill ``action`` at many moments; count the kills, and which file was there afterwards."""
    path, act = folder / "m.onnx", ACTIONS[action]
    counts = {"kills": 0, "old": 0, "new": 0, "debris": 0}
    drawn = random.Random(0)
    (write if action == "refit" else act)(path, 1.0, external)
    start = {file.name: file.read_bytes() for file in folder.iterdir()}
    # The same weights again, too: the data file that is written then is the one that the old file uses.
    for value in (2.0,) if action == "refit" else (2.0, 1.0):
        for number in range(1, rounds + 1):
            shutil.rmtree(folder)
            folder.mkdir()
            for name, content in start.items():
                (folder / name).write_bytes(content)

            def work(number: int = number, value: float = value) -> None:
                if how == "events":
                    die_at_event(number, folder)
                elif how == "bytes":
                    die_at_byte(number * 5000 // rounds)
                for turn in range(1_000_000 if how == "times" else 1):
                    act(path, value if turn % 2 == 0 else 1.0, external)

            if forked(work, drawn.uniform(0.001, 0.05) if how == "times" else None):
                break
            counts["kills"] += 1
            now = held(path)
            assert now in (1.0, value), now
            counts["new" if now == value else "old"] += 1
            allowed = {"m.onnx", *(file.name for file in files.own_data(path))}
            debris = [file for file in folder.iterdir() if file.name not in allowed]
            assert len(debris) <= 2 and all(DEBRIS.fullmatch(file.name) for file in debris), debris
            counts["debris"] += len(debris)
            # A day later: the next write takes the temporary files away, and works.
            for file in debris:
                os.utime(file, (0, 0))
            write(path, 3.0, external)
            assert held(path) == 3.0
            left = {file.name for file in folder.iterdir()} - {"m.onnx"}
            assert all(name.endswith(".data") for name in left), left
    return counts


if __name__ == "__main__":
    torch.set_num_threads(1)
    _results = []
    for _job, (_action, _external, _how, _rounds) in enumerate(json.loads(sys.argv[2])):
        _folder = Path(sys.argv[1]) / str(_job)
        _folder.mkdir()
        _results.append(helper_program(_folder, _action, _external == "external", _how, _rounds))
    print(json.dumps(_results))


# ---- tests -----------------------------------------------------------------------------------------------------------


Job = tuple[str, str, str, int]


def killed(tmp_path: Path, *jobs: Job) -> list[dict[str, int]]:
    """What ``helper_program`` counted in each job: what is killed, where the weights lie, how, how often at most."""
    command = [sys.executable, __file__, os.fspath(tmp_path), json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    results: list[dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    print(*zip(jobs, results, strict=True), sep="\n")
    assert all(counts["kills"] == counts["old"] + counts["new"] for counts in results)
    return results


def test_killed_at_every_access(tmp_path: Path) -> None:
    jobs: list[Job] = [(action, place, "events", 200) for action in ("write", "refit") for place in ("inline", "external")]
    for counts in killed(tmp_path, *jobs):
        assert 8 <= counts["kills"] < 200 and counts["old"] and counts["new"] and counts["debris"]


def test_killed_in_the_middle_of_a_write_and_at_any_time(tmp_path: Path) -> None:
    jobs: list[Job] = [("write", "inline", "bytes", 6), ("write", "external", "bytes", 6), ("write", "external", "times", 12)]
    *bytewise, timed = killed(tmp_path, *jobs)
    assert all(counts["kills"] >= 6 and counts["debris"] for counts in bytewise)
    assert timed["kills"] == 24


@pytest.mark.exhaustive
@pytest.mark.parametrize("place", ["inline", "external"])
@pytest.mark.parametrize(
    ("action", "how", "rounds"),
    [
        ("export", "events", 500),
        ("export", "bytes", 20),
        ("refit", "bytes", 50),
        ("refit", "times", 300),
        ("write", "times", 300),
    ],
)
def test_killed_very_often(tmp_path: Path, action: str, place: str, how: str, rounds: int) -> None:
    assert killed(tmp_path, (action, place, how, rounds))[0]["kills"] >= 5


def test_young_temporary_files_and_those_of_others_stay(tmp_path: Path) -> None:
    """Another process may be about to rename them."""
    young = [".m.onnx.0123456789abcdef.tmp", ".m.onnx.0123456789abcdef.data.0123456789abcdef.tmp"]
    others = [
        ".n.onnx.0123456789abcdef.tmp",
        ".m.onnx.short.tmp",
        "m.onnx.0123456789abcdef.tmp",
        ".m.onnx.0123456789abcdef.tmp2",
    ]
    for name in (*young, *others):
        (tmp_path / name).write_text("")
    for name in others:
        os.utime(tmp_path / name, (0, 0))
    write(tmp_path / "m.onnx", 1.0, False)
    assert {file.name for file in tmp_path.iterdir()} == {"m.onnx", *young, *others}
    for name in young:
        os.utime(tmp_path / name, (0, 0))
    write(tmp_path / "m.onnx", 2.0, False)
    assert {file.name for file in tmp_path.iterdir()} == {"m.onnx", *others}
