"""Assertions for code that rewrites models, and a pytest fixture that keeps graph snapshots.

PYTEST_DONT_REWRITE: nothing here is an assert statement.

``assert_same_graph`` and ``assert_same_numbers`` need nothing but PyTorch. The fixture ``graph_snapshot`` comes with::

    # conftest.py in the root of the tests
    pytest_plugins = ["fxparam.testing"]

    # a test
    def test_fold(graph_snapshot):
        graph_snapshot(fxparam.fold(model))

A snapshot is the canonical listing of the graph, so it changes with the structure only: not with names of temporaries,
nor with the order of independent nodes. Snapshots are kept in ``__graphs__`` next to the test file; ``pytest
--update-graphs`` writes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from fxparam.errors import missing_extra
from fxparam.graphdiff import diff, parse, read
from fxparam.graphdiff.reading import Model, agree_on_inputs
from fxparam.graphdiff.result import compare

if TYPE_CHECKING:
    import pytest

__all__ = ["GraphSnapshot", "assert_same_graph", "assert_same_numbers", "graph_snapshot", "tolerance"]

_HEADER = "# fxparam graph snapshot 1\n"


def assert_same_graph(a: Model, b: Model, *, values: bool = False) -> None:
    """Fail unless the graphs of two models are isomorphic.

    Args:
        a: anything that ``fxparam.graphdiff.diff`` takes; what is there.
        b: the same; what is expected.
        values: whether tensors have to be equal bit for bit as well.

    Raises:
        AssertionError: they differ; the message is the difference from ``b`` to ``a``.
    """
    found = diff(b, a, values=values)
    if found:
        raise AssertionError(f"the graph is not the expected one; from expected to found:\n{found}")


def tolerance(dtype: torch.dtype) -> float:
    """The largest error allowed relative to the largest entry of a tensor: so many roundings, none for exact types.

    64 for float32 (7.6e-6) and float64 (1.4e-14), 4 for 16-bit types, whose sums are accumulated in float32 (bfloat16
    0.03).
    """
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0.0
    eps = torch.finfo(dtype).eps
    return (64 if eps < 1e-6 else 4) * eps


def assert_same_numbers(
    f: Callable[..., Any],
    g: Callable[..., Any],
    inputs: tuple[Any, ...],
    *,
    rtol: float | None = None,
    atol: float | None = None,
    gradients: bool = True,
) -> None:
    """Fail unless ``f`` and ``g`` give the same outputs and gradients on ``inputs``.

    A tensor ``x`` agrees with the expected ``y`` if ``|x - y| <= atol + rtol * max|y|`` in each entry: relative to the
    largest entry, since rounding in a sum is. Both run under the same random seed. Gradients are those of one random
    linear functional of the floating outputs, with respect to the floating inputs and, if both are modules, to the
    parameters that both have under one name.

    Args:
        f: a function or module: what is tested.
        g: a function or module: the oracle.
        inputs: positional arguments; tensors may be nested in tuples, lists and dicts.
        rtol: default ``tolerance`` of the dtype of the expected tensor.
        atol: default 0.
        gradients: whether gradients are compared.

    Raises:
        AssertionError: shapes, dtypes, structure, values or gradients differ; the message says which and by how much.
        ValueError: gradients are asked for, and neither an input nor a shared parameter can have one.
    """
    names = _shared_parameters(f, g) if gradients else ()
    found, expected = _run(f, inputs, names, gradients), _run(g, inputs, names, gradients)
    if gradients and not any(key.startswith("gradient") for key in expected):
        raise ValueError(
            "there is no gradient to compare: no input is a floating tensor, no parameter that requires a gradient has "
            "the same name in both, or no output depends on one; pass gradients=False"
        )
    if list(found) != list(expected):
        raise AssertionError(f"got the values {list(found)}, expected {list(expected)}")
    for key, value in expected.items():
        _assert_close(key, found[key], value, rtol, atol)


def _shared_parameters(f: object, g: object) -> tuple[str, ...]:
    if not isinstance(f, nn.Module) or not isinstance(g, nn.Module):
        return ()
    other = dict(g.named_parameters())
    return tuple(n for n, p in f.named_parameters() if n in other and p.requires_grad and other[n].requires_grad)


def _run(f: Callable[..., Any], inputs: tuple[Any, ...], names: tuple[str, ...], gradients: bool) -> dict[str, Any]:
    """Outputs and gradients by a readable name."""

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().clone().requires_grad_(gradients and _has_gradient(value))

    arguments = tree_map(leaf, inputs)
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(gradients):
        torch.manual_seed(0)
        outputs, structure = tree_flatten(f(*arguments))
    result: dict[str, Any] = {f"output {k} of {structure}": value for k, value in enumerate(outputs)}
    if not gradients:
        return result
    leaves = {f"input {k}": v for k, v in enumerate(tree_flatten(arguments)[0]) if isinstance(v, Tensor) and v.requires_grad}
    parameters = dict(f.named_parameters()) if isinstance(f, nn.Module) else {}
    leaves |= {f"parameter {name}": parameters[name] for name in names}
    return result | dict(_gradients(outputs, leaves))


def _gradients(outputs: list[Any], leaves: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    roots = [value for value in outputs if isinstance(value, Tensor) and value.requires_grad]
    if not roots or not leaves:
        return
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(r.shape, dtype=r.dtype, generator=generator).to(r.device) for r in roots]
    found = torch.autograd.grad(roots, list(leaves.values()), weights, allow_unused=True, materialize_grads=True)
    yield from ((f"gradient of {name}", grad) for name, grad in zip(leaves, found, strict=True))


def _has_gradient(value: Tensor) -> bool:
    return value.dtype.is_floating_point or value.dtype.is_complex


def _assert_close(name: str, found: Any, expected: Any, rtol: float | None, atol: float | None) -> None:
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
        if type(found) is not type(expected) or found != expected:
            raise AssertionError(f"{name}: got {found!r}, expected {expected!r}")
        return
    kinds = [f"{x.dtype}{list(x.shape)}" for x in (found, expected)]
    if kinds[0] != kinds[1]:
        raise AssertionError(f"{name}: got {kinds[0]}, expected {kinds[1]}")
    relative = tolerance(expected.dtype) if rtol is None else rtol
    finite = expected.detach()[expected.detach().isfinite()]
    scale = float(finite.abs().max()) if relative and finite.numel() else 0.0
    allowed = (atol or 0.0) + relative * scale
    torch.testing.assert_close(found, expected, rtol=0.0, atol=allowed, equal_nan=True, msg=lambda text: f"{name}: {text}")


class GraphSnapshot:
    """Compares graphs with the listings that were kept.

    Args:
        folder: where listings are kept.
        name: the file name of the first one, without suffix.
        update: write instead of compare.
    """

    def __init__(self, folder: Path, name: str, update: bool) -> None:
        self.folder, self.name, self.update = folder, re.sub(r"[^\w.=-]+", "_", name).strip("_"), update

    def __call__(self, model: Model, name: str | None = None, *, values: bool = False) -> None:
        """Fail unless the graph of ``model`` is the one that was kept.

        Args:
            model: anything that ``fxparam.graphdiff.diff`` takes.
            name: tells several snapshots of one test apart.
            values: whether the values of tensors are kept as well.

        Raises:
            AssertionError: it differs, or none was kept; the message says what to type.
        """
        path = self.folder / f"{self.name}{'-' + name if name else ''}.graph"
        graph = read(model, values=values)
        if self.update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_HEADER + graph.text, encoding="utf-8")
            return
        if not path.exists():
            raise AssertionError(f"there is no graph snapshot {path}; type: pytest --update-graphs")
        text = path.read_text(encoding="utf-8")
        if not text.startswith(_HEADER):
            raise AssertionError(f"{path} does not begin with {_HEADER!r}; write it again: pytest --update-graphs")
        found = compare(*agree_on_inputs(parse(text.removeprefix(_HEADER)), graph))
        if found:
            raise AssertionError(
                f"the graph is not the one in {path}; from kept to found:\n{found}\n"
                "if this is meant, type: pytest --update-graphs"
            )


def pytest_addoption(parser: pytest.Parser) -> None:
    """The flag ``--update-graphs``."""
    parser.getgroup("fxparam").addoption(
        "--update-graphs", action="store_true", help="write the graph snapshots of fxparam.testing instead of comparing"
    )


try:
    import pytest as _pytest
except ImportError:

    def graph_snapshot(*_: Any, **__: Any) -> GraphSnapshot:
        """The pytest fixture; pytest is not installed."""
        raise missing_extra("pytest", "test", "for the fixture graph_snapshot")
else:

    @_pytest.fixture
    def graph_snapshot(request: pytest.FixtureRequest) -> GraphSnapshot:
        """Keeps graphs of a test in ``__graphs__``: call it with a model (see ``GraphSnapshot``)."""
        folder = request.path.parent / "__graphs__" / request.path.stem
        return GraphSnapshot(folder, request.node.name, request.config.getoption("--update-graphs"))
