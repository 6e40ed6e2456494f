"""What the tests of passes share: golden texts, and running a graph on given tensors."""

# Attributes of modules are tensors or modules to mypy, whatever a test put there.
# mypy: disable-error-code="operator,index,union-attr,arg-type,type-var,misc,has-type,attr-defined,assignment,return-value"

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden() -> Callable[[str, str], None]:
    """Compares a text with the one kept under a name; ``UPDATE_GOLDENS=1 pytest tests/passes`` writes it."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        text = text.strip() + "\n"
        if os.environ.get("UPDATE_GOLDENS") == "1":
            path.write_text(text, encoding="utf-8")
            return
        assert path.exists(), f"there is no {path.name}; type: UPDATE_GOLDENS=1 pytest tests/passes"
        assert text == path.read_text(encoding="utf-8"), f"{path.name} differs; if meant: UPDATE_GOLDENS=1 pytest tests/passes"

    return check


class _Run(fx.Interpreter):
    def __init__(self, graph: fx.Graph, tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> None:
        super().__init__(nn.Module(), graph=graph)
        self.tensors, self.modules = tensors, modules

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.tensors[target]

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.modules[target](*args, **kwargs)


@pytest.fixture(scope="session")
def execute() -> Callable[..., Any]:
    """Runs a graph: ``execute(graph, tensors, *inputs, modules={})``."""

    def run(
        graph: fx.Graph, tensors: Mapping[str, Tensor], *inputs: Any, modules: Mapping[str, nn.Module] | None = None
    ) -> Any:
        return _Run(graph, tensors, modules or {}).run(*inputs, enable_io_processing=False)

    return run


@pytest.fixture(autouse=True)
def _float64() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
