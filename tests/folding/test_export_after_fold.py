"""``torch.export`` and ONNX of folded and restored models against those of the plain model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from folding.common import (
    CASES,
    TABLE,
    Case,
    Conv,
    Doubled,
    Lstm,
    Mlp,
    N,
    Normed,
    StandardizedNet,
    Tied,
    by_legacy_weight_norm,
    by_prune,
    by_spec,
    close,
    inputs,
    made,
    run,
)
from torch import Tensor, nn

import fxparam as fxp


@pytest.mark.parametrize("case", TABLE)
def test_the_exported_graph_is_that_of_the_plain_model(case: Case) -> None:
    plain, model = made(case)
    restored = fxp.restore(model).eval()

    def listing(module: nn.Module) -> list[str]:
        program = torch.export.export(module, (inputs(),))
        nodes = [f"{n.op} {n.name} {n.target} {n.args}" for n in program.graph.nodes]
        names = [str(spec.target) for spec in program.graph_signature.input_specs]
        return nodes + names if case.by is by_spec else [line for line in nodes if "placeholder" not in line] + sorted(names)

    with pytest.warns() if case.net is Lstm else _quiet():
        assert listing(restored) == listing(plain)


def _quiet() -> Any:
    from contextlib import nullcontext

    return nullcontext()


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(N, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).relu() if x.shape[0] > 2 else self.a(x)


def test_without_inputs_the_error_says_what_to_pass() -> None:
    model = fxp.transform(Branching(), {"a.weight": Doubled()})
    with pytest.raises(
        fxp.TraceError, match=r"cannot be traced without inputs: .*fxp\.fold\(model, example_inputs=\(x, \.\.\.\)\)"
    ):
        fxp.fold(model)
    folded = fxp.fold(model, example_inputs=(torch.randn(4, N),))
    x = torch.randn(4, N)
    torch.testing.assert_close(folded(x), model(x))
    given = fxp.transform(Branching(), {"a.weight": Doubled()}, example_inputs=(torch.randn(4, N),))
    torch.testing.assert_close(fxp.fold(given)(x), given(x))


@pytest.mark.parametrize("case", [c for c in CASES if c.by in (by_spec, by_legacy_weight_norm)], ids=str)
def test_the_export_layer_folds_to_the_same_numbers(case: Case) -> None:
    """The graph comes from ``torch.export`` where symbolic tracing is not exact."""
    from fxparam.api.fold import _exported, plain_model

    plain, model = made(case)
    for arithmetic in (True, False):
        folded = _exported(plain_model(model), ((inputs(),), {}), None, None, arithmetic)
        close(run(folded, inputs()), run(plain, inputs()))
        close(run(folded, inputs(seed=8)), run(plain, inputs(seed=8)))
        assert not any(p.requires_grad for p in folded.parameters())


def nodes(path: Path) -> tuple[list[Any], list[str]]:
    import onnx

    graph = onnx.load(path).graph
    return [(n.op_type, n.name, list(n.input), list(n.output)) for n in graph.node], sorted(i.name for i in graph.initializer)


@pytest.mark.parametrize(
    "case", [Case(Mlp, by_spec), Case(Conv, by_legacy_weight_norm), Case(Tied, by_spec), Case(Mlp, by_prune)], ids=str
)
@pytest.mark.filterwarnings("ignore")
def test_the_onnx_file_is_that_of_the_plain_model(case: Case, tmp_path: Path) -> None:
    plain, model = made(case, torch.float32)
    x = inputs(torch.float32)
    fxp.export_onnx(plain, (x,), tmp_path / "plain.onnx")
    fxp.export_onnx(model, (x,), tmp_path / "model.onnx")
    assert nodes(tmp_path / "model.onnx") == nodes(tmp_path / "plain.onnx")
    assert not any("parametrizations" in name for name in nodes(tmp_path / "model.onnx")[1])


@pytest.mark.parametrize("case", [Case(Mlp, by_spec), Case(Normed, by_spec), Case(StandardizedNet, by_spec)], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_refit_after_training(case: Case, tmp_path: Path) -> None:
    import onnxruntime

    _, model = made(case, torch.float32)
    x = inputs(torch.float32)
    path = tmp_path / "model.onnx"
    fxp.export_onnx(model, (x,), path)
    before = nodes(path)
    model.train()
    model(x).square().sum().backward()
    torch.optim.SGD(model.parameters(), 0.3).step()
    model.eval()
    fxp.refit_onnx(path, model, (x,))
    assert nodes(path) == before
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), run(model, x)[0], rtol=1e-4, atol=1e-5)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(N, N)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.lin(x)
        return y if mask is None else y * mask


class Centred(Masked):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            centre = x.mean()
        return self.lin(x) * centre


class Rolled(Masked):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for row in x:
            x = self.lin(x) * row.sum() * random.random()
        return x


def test_optional_inputs_that_are_given_count() -> None:
    model = fxp.transform(Masked().double(), {"lin.weight": Doubled()})
    x, mask = torch.randn(2, N).double(), torch.rand(2, N).double()
    torch.testing.assert_close(fxp.fold(model, example_inputs=(x, mask))(x, mask), model(x, mask))
    torch.testing.assert_close(fxp.fold(model, example_inputs=(x,))(x), model(x))


@pytest.mark.parametrize("arithmetic", [True, False])
def test_regions_of_an_exported_graph_are_kept(arithmetic: bool, tmp_path: Path) -> None:
    model = fxp.transform(Centred(), {"lin.weight": Doubled()})
    x = torch.randn(2, N)
    folded = fxp.fold(model, example_inputs=(x,), arithmetic=arithmetic)
    torch.testing.assert_close(folded(x), model(x))
    assert fxp.export_onnx(model, (x,), tmp_path / "m.onnx").initializers == ("lin.weight", "lin.bias")


def test_an_export_that_would_bake_random_numbers_is_refused() -> None:
    model = fxp.transform(Rolled(), {"lin.weight": Doubled()})
    with pytest.raises(fxp.TraceError, match="draws random numbers that are not PyTorch's"):
        fxp.fold(model, example_inputs=(torch.randn(2, N),))
