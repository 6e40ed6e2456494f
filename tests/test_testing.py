"""``fxparam.testing``: assertions that pass and fail, and the snapshot fixture run by pytest inside pytest."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxparam.testing
from fxparam.testing import GraphSnapshot, assert_same_graph, assert_same_numbers, tolerance

pytest_plugins = ["pytester"]


def test_same_graph() -> None:
    assert_same_graph(nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU()))
    with pytest.raises(AssertionError, match=r"from expected to found:\n1 difference: 1 changed\n~ _0: op torch.nn.Tanh -> "):
        assert_same_graph(nn.Sequential(nn.ReLU()), nn.Sequential(nn.Tanh()))
    with pytest.raises(AssertionError, match="~ _0: bias value "):
        assert_same_graph(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)), values=True)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def data(dtype: torch.dtype) -> Tensor:
    return torch.randn(5, 3, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
def test_same_numbers_up_to_rounding(dtype: torch.dtype) -> None:
    x = data(dtype)
    assert_same_numbers(lambda x: (x * x).sum(0), lambda x: torch.stack([*(x * x)]).sum(0), (x,))
    factor = 1 + 2 * tolerance(dtype)
    with pytest.raises(AssertionError, match=r"output 0 of \*: Tensor-likes are not close"):
        assert_same_numbers(lambda x: x * factor, lambda x: x, (x,))
    assert_same_numbers(lambda x: x * factor, lambda x: x, (x,), rtol=3 * tolerance(dtype))
    assert x.grad is None and not x.requires_grad


def test_equal_values_with_other_gradients_fail() -> None:
    x = data(torch.float64)
    with pytest.raises(AssertionError, match="gradient of input 0: Tensor-likes are not close"):
        assert_same_numbers(torch.round, StraightThrough.apply, (x,))
    assert_same_numbers(torch.round, StraightThrough.apply, (x,), gradients=False)


def test_gradients_of_parameters_with_the_same_name() -> None:
    class Detached(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight, self.bias.detach())

    f, g = nn.Linear(3, 2, dtype=torch.float64), Detached(3, 2, dtype=torch.float64)
    g.load_state_dict(f.state_dict())
    assert_same_numbers(f, f, (data(torch.float64),))
    with pytest.raises(AssertionError, match="gradient of parameter bias"):
        assert_same_numbers(f, g, (data(torch.float64),))
    assert f.bias.grad is None


@pytest.mark.parametrize(
    "f, text",
    [
        (lambda x: x.float(), r"output 0 of \*: got torch.float32\[5, 3\], expected torch.float64\[5, 3\]"),
        (lambda x: x[0], r"got torch.float64\[3\], expected torch.float64\[5, 3\]"),
        (lambda x: (x, x), "got the values .*output 1 of"),
        (lambda x: 3, "got 3, expected tensor"),
    ],
)
def test_outputs_of_another_form_fail(f: Any, text: str) -> None:
    with pytest.raises(AssertionError, match=text):
        assert_same_numbers(f, lambda x: x, (data(torch.float64),), gradients=False)


def test_nothing_to_differentiate_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"there is no gradient to compare: .* pass gradients=False"):
        assert_same_numbers(lambda x: x, lambda x: x, (torch.arange(3),))
    assert_same_numbers(lambda x: x + 1, lambda x: 1 + x, (torch.arange(3),), gradients=False)
    with pytest.raises(AssertionError, match="output 0"):
        assert_same_numbers(lambda x: x + 1, lambda x: x, (torch.arange(3),), gradients=False)


def test_both_run_under_the_same_seed() -> None:
    state = torch.get_rng_state()
    assert_same_numbers(nn.functional.dropout, nn.Dropout(0.5), (data(torch.float64),))
    assert torch.equal(state, torch.get_rng_state())


SNAPSHOT_TEST = """
import pytest
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 3)
    def forward(self, x):
        {body}

@pytest.mark.parametrize("case", ["a/b"])
def test_net(graph_snapshot, case):
    graph_snapshot(Net())
    graph_snapshot(nn.ReLU(), "second")
"""
BODY = "y = self.fc(x); a = torch.relu(y); b = torch.sin(y); return a - b"
RENAMED = "h = self.fc(x); second = torch.sin(h); first = torch.relu(h); return first - second"
SWAPPED = "y = self.fc(x); a = torch.relu(y); b = torch.sin(y); return b - a"


def test_snapshots(pytester: pytest.Pytester) -> None:
    def run(body: str, *options: str) -> pytest.RunResult:
        pytester.makepyfile(test_it=textwrap.dedent(SNAPSHOT_TEST).format(body=body))
        return pytester.runpytest_inprocess("-p", "fxparam.testing", "-p", "no:cacheprovider", *options)

    missing = run(BODY)
    missing.assert_outcomes(failed=1)
    missing.stdout.fnmatch_lines(["*there is no graph snapshot *test_net_a_b.graph; type: pytest --update-graphs"])
    run(BODY, "--update-graphs").assert_outcomes(passed=1)
    kept = sorted(path.name for path in (pytester.path / "__graphs__" / "test_it").iterdir())
    assert kept == ["test_net_a_b-second.graph", "test_net_a_b.graph"]
    run(BODY).assert_outcomes(passed=1)
    run(RENAMED).assert_outcomes(passed=1)
    changed = run(SWAPPED)
    changed.assert_outcomes(failed=1)
    changed.stdout.fnmatch_lines(["*1 difference: 1 moved", "*> sub: reads sin, relu, was %*", "*if this is meant, type:*"])
    run(SWAPPED, "--update-graphs").assert_outcomes(passed=1)
    run(SWAPPED).assert_outcomes(passed=1)


def test_a_snapshot_is_a_listing_that_people_can_read(tmp_path: Path) -> None:
    GraphSnapshot(tmp_path, "net", update=True)(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
    assert (tmp_path / "net.graph").read_text().splitlines() == [
        "# fxparam graph snapshot 1",
        "%0\tinput\tinput\t0\t()",
        '%1\tcall\ttorch.nn.Linear\t0\t(%0)\t\t{"options": "in_features=2, out_features=3, bias=True", '
        '"bias": "float32[3]", "weight": "float32[3, 2]"}',
        '%2\tcall\ttorch.nn.ReLU\t1\t(%1)\t\t{"inplace": "False"}',
        "%3\toutput\toutput\t\t(%2)",
    ]
    (tmp_path / "net.graph").write_text("something else\n")
    with pytest.raises(AssertionError, match="does not begin with '# fxparam graph snapshot 1"):
        GraphSnapshot(tmp_path, "net", update=False)(nn.ReLU())


def test_values_can_be_kept(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    GraphSnapshot(tmp_path, "net", update=True)(model, values=True)
    GraphSnapshot(tmp_path, "net", update=False)(model, values=True)
    with torch.no_grad():
        model.get_parameter("0.bias").add_(1)
    with pytest.raises(AssertionError, match="bias value "):
        GraphSnapshot(tmp_path, "net", update=False)(model, values=True)


def test_the_assertions_work_without_pytest() -> None:
    code = """
    import sys
    sys.modules["pytest"] = None
    from torch import nn
    import fxparam.testing
    fxparam.testing.assert_same_graph(nn.ReLU(), nn.ReLU())
    try:
        fxparam.testing.graph_snapshot()
    except ImportError as error:
        print(error)
    """
    root = Path(fxparam.testing.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == (
        "pytest is needed for the fixture graph_snapshot and is not installed; type: pip install 'fxparam[test]'\n"
    )
