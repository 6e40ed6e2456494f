"""New weights into an ONNX file from a checkpoint, where there is no model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import fxparam as fxp
from fxparam.errors import ExportError, MissingExtraError
from fxparam.exporters.prologue import read_prologue

X = torch.linspace(-1, 1, 12).reshape(2, 6)


class Net(nn.Module):
    """Several maps, a joint one, references, a tie, a plain layer, statistics, a buffer that no checkpoint has."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in (
            "rotate",
            "cayley",
            "normed",
            "spectral",
            "masked",
            "adapted",
            "left",
            "right",
            "plain",
            "encode",
            "decode",
        ):
            self.register_module(name, nn.Linear(6, 6))
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.get_submodule("plain").weight  # type: ignore[assignment]
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("steps", torch.ones(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for name, layer in self.named_children():
            x = x + torch.tanh(layer(x)) if name != "norm" else layer(x)
        return x * self.steps


def transformed(seed: int = 0) -> fxp.ParametrizedModule:
    torch.manual_seed(seed)
    spec: dict[Any, Any] = {
        "rotate.weight": fxp.orthogonal(),
        "cayley.weight": fxp.orthogonal(map="cayley"),
        "normed.weight": fxp.weight_norm(),
        "spectral.weight": fxp.spectral_norm(),
        "masked.weight": fxp.weight_norm() >> fxp.mask(density=0.5),
        "adapted.weight": fxp.lora(rank=2),
        "decode.weight": fxp.ref("encode.weight") >> fxp.transpose(),
        fxp.joint("left.*", "right.*"): fxp.subspace(dim=5),
    }
    return fxp.transform(Net(), spec)


def train(model: nn.Module, steps: int = 4) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.randn(8, 6)) - 1).square().mean().backward()
        optimizer.step()


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, fxp.ParametrizedModule]:
    """A folder with a deployed file, its prologue and later checkpoints; and the model at the end of the training."""
    folder = tmp_path_factory.mktemp("shipped")
    model = transformed()
    train(model, 1)
    fxp.export_onnx(model, (X,), folder / "m.onnx", verify=0)
    fxp.export_prologue(model, folder / "m.prologue")
    train(model)
    torch.save(model.state_dict(), folder / "end.pt")
    from safetensors.torch import save_model

    save_model(model._fxp_live, str(folder / "end.safetensors"))  # of tied tensors it keeps one name
    return folder, model


@pytest.fixture
def folder(shipped: tuple[Path, Any], tmp_path: Path) -> Path:
    for source in shipped[0].iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    return tmp_path


def outputs(path: Path) -> Tensor:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: X.numpy()})[0])


def refused(folder: Path, match: str, **changed: Any) -> str:
    """The text of the error; nothing in the folder changed."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ExportError, match=match) as caught:
        fxp.refit_onnx(folder / "m.onnx", **{"prologue": folder / "m.prologue", "checkpoint": folder / "end.pt", **changed})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    return str(caught.value)


ELSEWHERE = """
import sys, fxparam
try:
    import export.test_prologue
except ImportError:
    pass
else:
    raise SystemExit("the model's class is here")
path, prologue, checkpoint = sys.argv[1:]
print(len(fxparam.refit_onnx(path, prologue=prologue, checkpoint=checkpoint).replaced))
"""


@pytest.mark.parametrize("checkpoint", ["end.pt", "end.safetensors"])
def test_a_process_without_the_model_writes_the_trained_weights(
    folder: Path, shipped: tuple[Path, fxp.ParametrizedModule], checkpoint: str
) -> None:
    files = [str(folder / name) for name in ("m.onnx", "m.prologue", checkpoint)]
    command = [sys.executable, "-W", "error", "-c", ELSEWHERE, *files]
    done = subprocess.run(command, cwd=folder, env={"PATH": "", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20
    model = shipped[1]
    was = model.training
    with torch.no_grad():
        expected = model.eval()(X)
    model.train(was)
    assert (outputs(shipped[0] / "m.onnx") - expected).abs().max() > 0.1, "training moved the outputs"
    torch.testing.assert_close(outputs(folder / "m.onnx"), expected, rtol=1e-5, atol=1e-5)


def test_the_weights_are_those_of_a_refit_with_the_model(folder: Path, shipped: tuple[Path, fxp.ParametrizedModule]) -> None:
    state = torch.load(folder / "end.pt", weights_only=True)
    weights, unknown = read_prologue(folder / "m.prologue").weights(state)
    expected = fxp.restore(shipped[1]).state_dict()
    assert weights.keys() == expected.keys() and unknown == ()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)
    assert torch.equal(weights["plain.bias"], expected["plain.bias"])


def test_the_model_is_as_it_was(tmp_path: Path) -> None:
    one, other = transformed(3), transformed(3)
    x = torch.randn(8, 6)
    losses = []
    for model in (one, other):
        model.train()
        model.masked.eval()
        losses.append(model(x).square().mean())
    modes = [module.training for module in one.modules()]
    report = fxp.export_prologue(one, tmp_path / "p")
    assert [module.training for module in one.modules()] == modes and one.stats == other.stats
    for model, loss in zip((one, other), losses, strict=True):
        loss.backward()
        torch.manual_seed(7)
        train(model, 2)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert report.fixed and report.bytes == (tmp_path / "p").stat().st_size
    assert str(report).startswith(f"{tmp_path / 'p'}: {len(report.sources)} tensors to {len(report.weights)} weights in ")


@pytest.mark.parametrize("prefixes", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off(folder: Path, prefixes: str) -> None:
    state = torch.load(folder / "end.pt", weights_only=True)
    torch.save({prefixes + name: value for name, value in state.items()}, folder / "wrapped.pt")
    fxp.refit_onnx(folder / "m.onnx", prologue=folder / "m.prologue", checkpoint=folder / "end.pt")
    again = fxp.refit_onnx(folder / "m.onnx", prologue=folder / "m.prologue", checkpoint=folder / "wrapped.pt")
    assert again.replaced == ()


def test_all_problems_of_a_checkpoint_are_listed_at_once(folder: Path) -> None:
    state = torch.load(folder / "end.pt", weights_only=True)
    state["rotate.parametrisations.weight.original"] = state.pop("rotate.parametrizations.weight.original")
    state["plain.bias"] = state["plain.bias"][:4]
    state["norm.bias"] = state["norm.bias"].double()
    state["tied.weight"] = state["tied.weight"] + 1
    state["norm.weight"] = 3
    torch.save(state, folder / "end.pt")
    lines = refused(folder, "cannot refit").splitlines()
    assert lines[0] == (
        f"cannot refit {folder / 'm.onnx'} from {folder / 'end.pt'}; it is unchanged: the checkpoint does not fit the prologue:"
    )
    assert set(lines[1:-1]) == {
        "  rotate.parametrizations.weight.original: missing; the checkpoint has rotate.parametrisations.weight.original",
        "  plain.bias: got shape (4,), expected (6,)",
        "  norm.bias: got dtype float64, expected float32",
        "  norm.weight: got int, expected a tensor",
        "  tied.weight and plain.weight are one tied tensor and got different values",
    }
    assert lines[-1] == "Give the state_dict of the model that the prologue was exported from"


def test_unknown_names_are_reported(folder: Path) -> None:
    state = torch.load(folder / "end.pt", weights_only=True)
    torch.save(state | {"head.weight": torch.ones(2)}, folder / "end.pt")
    report = fxp.refit_onnx(folder / "m.onnx", prologue=folder / "m.prologue", checkpoint=folder / "end.pt")
    assert report.ignored == ("norm.num_batches_tracked", "head.weight")


def test_checkpoints_of_other_forms_are_refused(folder: Path) -> None:
    state = torch.load(folder / "end.pt", weights_only=True)
    torch.save({"model": state, "epoch": 3}, folder / "end.pt")
    refused(folder, r"holds more than a state_dict: 'model' are dictionaries; type .*\['model'\]")
    torch.save([1], folder / "end.pt")
    refused(folder, "holds a list, expected a state_dict; save model.state_dict")
    torch.save({"a": Path}, folder / "end.pt")
    refused(folder, "is corrupt, or holds other than tensors")
    (folder / "end.safetensors").write_bytes(b"no")
    refused(folder, "is corrupt, or holds other than tensors", checkpoint=folder / "end.safetensors")
    refused(folder, r"there is no checkpoint .*; type torch.save\(model.state_dict", checkpoint=folder / "none.pt")


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(MissingExtraError, match=r"safetensors is needed to read this checkpoint .* 'fxparam\[safetensors\]'"):
        fxp.refit_onnx(folder / "m.onnx", prologue=folder / "m.prologue", checkpoint=folder / "end.safetensors")


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_truncated_prologues_are_refused(folder: Path, keep: int) -> None:
    file = folder / "m.prologue"
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, r"m\.prologue is corrupt, truncated or no prologue .* type fxp\.export_prologue\(model, ")


def test_other_files_are_no_prologues(folder: Path) -> None:
    refused(folder, "is corrupt, truncated or no prologue", prologue=folder / "end.pt")
    refused(folder, "is corrupt, truncated or no prologue", prologue=folder / "m.onnx")
    refused(folder, "there is no file .*none", prologue=folder / "none")


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


def test_nothing_in_a_file_is_executed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    torch.save({"fxparam.prologue": Evil(), "tensors": []}, folder / "m.prologue")
    refused(folder, "is corrupt, truncated or no prologue")
    torch.save({"plain.bias": Evil()}, folder / "end.pt")
    refused(folder, "is corrupt", prologue=folder / "m.prologue")
    assert not (folder / "executed").exists()


def edit(file: Path, change: Any) -> None:
    content = torch.load(file, weights_only=True)
    data = json.loads(content["fxparam.prologue"])
    change(data)
    torch.save(content | {"fxparam.prologue": json.dumps(data)}, file)


@pytest.mark.parametrize(
    "op", ["aten.from_file.default", "prim.Print.default", "aten.nothing.default", "aten.mul", "os.system.x"]
)
def test_only_operators_of_pytorch_can_be_named(folder: Path, op: str) -> None:
    edit(folder / "m.prologue", lambda data: data["steps"][0].update(op=op))
    refused(folder, rf"names the operator '{op}', which torch .* does not have or a prologue may not call")


def test_edited_prologues_are_refused(folder: Path) -> None:
    kept = (folder / "m.prologue").read_bytes()
    for change, match in (
        (lambda data: data.update(format=9), r"has format 9 of fxparam .*, expected 1; export it again"),
        (lambda data: data["weights"].update({"plain.bias": 10**6}), "is corrupt, truncated or no prologue"),
        (lambda data: data.update(default_dtype="load"), "'load' is no dtype"),
        (lambda data: data["fixed"].append("more"), "is corrupt, truncated or no prologue"),
        (lambda data: data["steps"][0].update(args=[]), "the prologue failed on this checkpoint"),
    ):
        edit(folder / "m.prologue", change)
        refused(folder, match)
        (folder / "m.prologue").write_bytes(kept)


@pytest.mark.parametrize("given", ["prologue", "checkpoint", "both", "nothing"])
def test_a_model_or_files_and_not_both(folder: Path, shipped: tuple[Path, fxp.ParametrizedModule], given: str) -> None:
    every: dict[str, dict[str, Any]] = {
        "prologue": {"checkpoint": None},
        "checkpoint": {"prologue": None},
        "both": {"model": shipped[1]},
        "nothing": {"prologue": None, "checkpoint": None},
    }
    text = refused(
        folder, r"type refit_onnx\(path, model\), or refit_onnx\(path, prologue=\.\.\., checkpoint=\.\.\.\)", **every[given]
    )
    named = {"both": "model, prologue, checkpoint", "nothing": "neither a model nor a prologue"}.get(given, given)
    assert text.startswith(f"got {named}; ")


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Sign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Straight.apply(x)


class Counted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def get_extra_state(self) -> Any:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_what_is_no_graph_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("old")
    model = fxp.transform(nn.Linear(3, 3), {"weight": fxp.custom(Sign())})
    with pytest.raises(ExportError, match=r"(?s)cannot write .*p; these weights cannot.*  weight \(.*\): .*autograd") as caught:
        fxp.export_prologue(model, tmp_path / "p")
    assert str(caught.value).endswith("Refit with the model: refit_onnx(path, model)")
    model = fxp.transform(nn.Linear(3, 3), {"weight": fxp.custom(Counted())})
    with pytest.raises(ExportError, match=r"parametrizations\.weight\.0\._extra_state: a dict, no tensor"):
        fxp.export_prologue(model, tmp_path / "p")
    with pytest.raises(ExportError, match=r"got Linear, expected a model that fxp\.transform returned"):
        fxp.export_prologue(nn.Linear(2, 2), tmp_path / "p")
    assert (tmp_path / "p").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["p"]


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x.diagonal().fill_(1)
        return x


def test_a_map_that_writes_in_place_is_refused(tmp_path: Path) -> None:
    model = fxp.transform(nn.Linear(3, 3), {"weight": fxp.custom(InPlace())})
    with pytest.raises(ExportError, match=r"  weight \(.*InPlace.*\): "):
        fxp.export_prologue(model, tmp_path / "p")
    assert not (tmp_path / "p").exists()


class Hidden(nn.Linear):
    """A state_dict without what the weight is computed from."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if not name.endswith("original")}


def test_a_latent_that_no_checkpoint_has_is_refused(tmp_path: Path) -> None:
    model = fxp.transform(Hidden(3, 3), {"weight": fxp.skew()})
    with pytest.raises(ExportError, match=r"  parametrizations\.weight\.original: not in the state_dict"):
        fxp.export_prologue(model, tmp_path / "p")


class Shifted(nn.Module):
    """A map with tensors that no checkpoint has, and one that it draws from the default dtype."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.full((3, 3), 2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift + torch.eye(3) / 3


def test_buffers_that_are_not_saved_are_fixed_and_the_default_dtype_is_kept(tmp_path: Path) -> None:
    model = fxp.transform(nn.Linear(3, 3), {"weight": fxp.custom(Shifted())})
    report = fxp.export_prologue(model, tmp_path / "p")
    assert "parametrizations.weight.0.shift" in report.fixed
    torch.set_default_dtype(torch.float64)
    try:
        weights, _ = read_prologue(tmp_path / "p").weights(model.state_dict())
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(weights["weight"], model.weight.detach(), rtol=0, atol=0)


def test_lora_layers_of_peft_are_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model = fxp.transform(peft.get_peft_model(net, peft.LoraConfig(target_modules=["0"], r=2)))
    with pytest.raises(ExportError, match=r"merged_weight: a LoRA layer of PEFT, which is merged under another name"):
        fxp.export_prologue(model, tmp_path / "p")


def test_a_prologue_that_makes_other_weights_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = nn.Linear(3, 3)
    monkeypatch.setattr("fxparam.api.export.plain_model", lambda model: other)
    (tmp_path / "p").write_text("old")
    with pytest.raises(ExportError, match="the prologue does not make the model's weights weight"):
        fxp.export_prologue(fxp.transform(nn.Linear(3, 3), {"weight": fxp.skew()}), tmp_path / "p")
    assert (tmp_path / "p").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["p"]


def test_an_error_in_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "p").write_text("old")
    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(ExportError, match=r"cannot write .*p: No space left on device; check free space and permissions"):
        fxp.export_prologue(fxp.transform(nn.Linear(3, 3), {"weight": fxp.skew()}), tmp_path / "p")
    assert (tmp_path / "p").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["p"]


def test_integers_and_folded_arithmetic_are_refused(tmp_path: Path) -> None:
    model = fxp.transform(nn.Linear(6, 6), {"weight": fxp.fake_quantize(bits=8)})
    fxp.export_prologue(model, tmp_path / "m.prologue")
    torch.save(model.state_dict(), tmp_path / "end.pt")
    fxp.export_onnx(model, (X,), tmp_path / "m.onnx", integers=True, verify=0)
    refused(tmp_path, r"it stores weight as integers, .* export it with integers=False")

    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.weight * 2).exp()

    own = fxp.transform(Own(6, 6), {"weight": fxp.skew()})
    fxp.export_prologue(own, tmp_path / "m.prologue")
    torch.save(own.state_dict(), tmp_path / "end.pt")
    fxp.export_onnx(own, (X,), tmp_path / "m.onnx", verify=0)
    refused(tmp_path, r"it holds folded weight arithmetic of the model's own \(hoisted\..* export it with arithmetic=False")


@pytest.mark.parametrize(
    "entry",
    [
        fxp.orthogonal(map="householder"),
        fxp.fake_quantize(bits=8),
        fxp.ternary(),
        fxp.positive_definite(),
        fxp.circulant(),
        fxp.doubly_stochastic(),
        fxp.sphere(),
        fxp.unitary(),
        fxp.hypernetwork(),
    ],
    ids=str,
)
def test_every_kind_of_map_goes_through_the_file(entry: Any, tmp_path: Path) -> None:
    dtype = torch.complex64 if "unitary" in str(entry) else torch.float64
    net = nn.Sequential(nn.Linear(4, 4, dtype=dtype), nn.Linear(4, 4, dtype=dtype))
    model = fxp.transform(net, {"*.weight": entry})
    fxp.export_prologue(model, tmp_path / "p")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    weights, _ = read_prologue(tmp_path / "p").weights(model.state_dict())
    for name, value in fxp.restore(model.eval()).state_dict().items():
        torch.testing.assert_close(weights[name], value)
