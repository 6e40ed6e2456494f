"""Selectors, declarations, their files, and what a spec means for a model."""

import json
import re
from typing import Any

import pytest
import torch
from torch import nn

import fxparam as fxp
from fxparam.declaration import Chain, Custom
from fxparam.errors import SpecError
from fxparam.spec.names import named_tensors
from fxparam.spec.resolve import resolve
from fxparam.spec.selectors import Glob, Joint, Regex


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.norm = nn.BatchNorm1d(4)
        self.decoder = nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight


def chosen(net: nn.Module, rule: object) -> list[str]:
    """The names that the tasks of a one-rule spec are about."""
    return [row.name for task in resolve(fxp.Spec({rule: fxp.symmetric()}), named_tensors(net)) for row in task.rows]


LINEAR_BIASES = ["encoder.bias", "blocks.0.bias", "blocks.1.bias", "decoder.bias"]
SELECTIONS = [
    ("encoder.weight", ["encoder.weight"]),
    ("*.weight", ["encoder.weight", "blocks.0.weight", "blocks.1.weight", "norm.weight"]),
    ("decoder.*", ["encoder.weight", "decoder.bias"]),
    ("BLOCKS.*", []),
    ("*running_mean", ["norm.running_mean"]),
    ("norm.*", ["norm.weight", "norm.bias"]),
    (re.compile(r"blocks\.\d\.bias"), ["blocks.0.bias", "blocks.1.bias"]),
    (re.compile("weight"), []),
    (fxp.where(nn.BatchNorm1d, "weight"), ["norm.weight"]),
    (fxp.where(nn.Linear), ["encoder.weight", "blocks.0.weight", "blocks.1.weight"]),
    (lambda name, tensor, owner: tensor.ndim == 1 and isinstance(owner, nn.Linear), LINEAR_BIASES),
    (fxp.joint("norm.*", re.compile(r"blocks\.1\..*")), ["blocks.1.weight", "blocks.1.bias", "norm.weight", "norm.bias"]),
]


@pytest.mark.parametrize(("rule", "names"), SELECTIONS, ids=range(len(SELECTIONS)))
def test_selectors_choose_by_name_type_and_predicate(rule: object, names: list[str]) -> None:
    if names == []:
        with pytest.raises(SpecError, match="matches nothing; nearest: "):
            chosen(Net(), rule)
    else:
        assert chosen(Net(), rule) == names


def test_a_joint_rule_is_one_task_in_registration_order() -> None:
    tasks = resolve(fxp.Spec({fxp.joint("decoder.bias", "encoder.*"): fxp.flat()}), named_tensors(Net()))
    assert [[row.name for row in task.rows] for task in tasks] == [["encoder.weight", "encoder.bias", "decoder.bias"]]
    assert tasks[0].rows[0].aliases == ("encoder.weight", "decoder.weight")


def test_ties_by_storage_are_one_weight() -> None:
    net = Net()
    net.decoder.weight = nn.Parameter(net.encoder.weight.data)
    assert chosen(net, "decoder.weight") == ["encoder.weight"]
    net.decoder.weight = nn.Parameter(net.encoder.weight.data.T)
    assert chosen(net, "decoder.weight") == ["decoder.weight"]


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"encoder.weigth": fxp.skew()}, r"rule 'encoder.weigth' matches nothing; nearest: encoder.weight"),
    (
        {"encoder.*": fxp.skew(), "decoder.weight": fxp.mask(density=0.5)},
        r"two rules for encoder.weight: 'encoder.\*' and 'decoder.weight'",
    ),
    (
        {
            "encoder.weight": fxp.ref("blocks.0.weight") >> fxp.transpose(),
            "blocks.0.weight": fxp.ref("blocks.1.weight") >> fxp.scale(2.0),
            "blocks.1.weight": fxp.ref("encoder.weight") >> fxp.transpose(),
        },
        r"in a circle: (.*) -> (.*) -> (.*) -> \1",
    ),
    ({"encoder.weight": fxp.ref("encoder.weight") >> fxp.transpose()}, r"circle: encoder.weight -> encoder.weight"),
    ({"encoder.weight": fxp.ref("nowhere.weight") >> fxp.transpose()}, r"ref\('nowhere.weight'\) names no tensor; nearest: "),
    ({"encoder.weight": fxp.existing() >> fxp.mask(density=0.5)}, r"nothing does; leave out fxp.existing\(\)"),
]


@pytest.mark.parametrize(("rules", "message"), ERRORS, ids=range(len(ERRORS)))
def test_a_spec_that_does_not_fit_says_what_to_do(rules: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        resolve(fxp.Spec(rules), named_tensors(Net()))


def test_the_circle_is_told_in_the_direction_of_reading() -> None:
    with pytest.raises(SpecError) as caught:
        resolve(fxp.Spec(ERRORS[2][0]), named_tensors(Net()))
    path = re.search(r"circle: (.*);", str(caught.value))
    assert path is not None
    reads = {"encoder.weight": "blocks.0.weight", "blocks.0.weight": "blocks.1.weight", "blocks.1.weight": "encoder.weight"}
    names = path[1].split(" -> ")
    assert [reads[name] for name in names[:-1]] == names[1:]


def test_a_weight_that_is_computed_already_needs_existing() -> None:
    net = Net()
    torch.nn.utils.parametrizations.weight_norm(net.blocks[0])
    with pytest.raises(SpecError, match=r"blocks.0.weight is already .* fxp.existing\(\) >> mask\(density=0.5\)"):
        fxp.transform(net, {"blocks.0.weight": fxp.mask(density=0.5)})


def test_lazy_parameters_are_refused() -> None:
    with pytest.raises(SpecError, match="weight is lazy and has no shape yet; run the model once"):
        fxp.transform(nn.LazyLinear(3), {"weight": fxp.weight_norm()})


def test_tasks_come_after_those_they_read() -> None:
    spec = fxp.Spec({"encoder.weight": fxp.ref("blocks.1.weight") >> fxp.transpose(), "blocks.1.weight": fxp.symmetric()})
    assert [task.rows[0].name for task in resolve(spec, named_tensors(Net()))] == ["blocks.1.weight", "encoder.weight"]


@pytest.mark.parametrize("value", [3, None, nn.Linear])
def test_what_is_no_selector_is_refused_with_the_forms_there_are(value: object) -> None:
    with pytest.raises(SpecError, match=r"expected a glob such as 'encoder"):
        fxp.Spec({value: fxp.skew()})


def test_what_is_no_declaration_is_refused_with_the_forms_there_are() -> None:
    with pytest.raises(SpecError, match=r"got 3 \(int\) as a declaration; expected a catalogue entry"):
        fxp.Spec({"*": 3})
    with pytest.raises(SpecError, match=r"got the catalogue entry skew without its call; type fxp.skew\(...\)"):
        fxp.Spec({"*": fxp.skew})
    with pytest.raises(SpecError, match=r"ref\('a'\) stands inside the chain .* can only come first"):
        fxp.Spec({"*": fxp.skew() >> fxp.ref("a")})
    with pytest.raises(SpecError, match="two rules have the same selector 'a'"):
        fxp.Spec({"a": fxp.skew(), Glob("a"): fxp.symmetric()})
    with pytest.raises(SpecError, match=r"joint\(\) is empty"):
        fxp.joint()
    with pytest.raises(SpecError, match="list all selectors in one"):
        fxp.joint(fxp.joint("a"), "b")
    with pytest.raises(SpecError, match="expected a module class"):
        fxp.where("Linear", "weight")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"expected names of weights, as in fxp.ref"):
        fxp.ref()


def test_a_spec_is_an_immutable_ordered_mapping() -> None:
    spec = fxp.Spec({"b": fxp.skew(), "a": fxp.symmetric()})
    assert list(spec) == [Glob("b"), Glob("a")] and len(spec) == 2 and spec["a"] == fxp.symmetric()
    with pytest.raises(TypeError):
        spec["c"] = fxp.skew()  # type: ignore[index]
    assert spec == fxp.Spec({"b": fxp.skew(), "a": fxp.symmetric()}) and hash(spec) == hash(fxp.Spec(spec))


def test_chains_read_from_left_to_right_and_take_plain_maps() -> None:
    module = nn.Identity()
    chain = torch.tanh >> fxp.scale(2.0) >> module
    assert isinstance(chain, Chain) and [type(step) for step in chain.steps] == [Custom, type(fxp.scale()), Custom]
    assert isinstance(chain.steps[2], Custom) and chain.steps[2].map is module
    assert repr(fxp.orthogonal(map="cayley") >> fxp.mask(density=0.5)) == "orthogonal(map='cayley') >> mask(density=0.5)"


FULL = {
    "rnn.weight_hh_l*": fxp.orthogonal(map="cayley"),
    re.compile(r"head\.\d\.weight"): fxp.weight_norm(dim=None) >> fxp.mask(density=0.25, by="random", seed=3),
    fxp.where(nn.Conv1d, "weight"): fxp.existing() >> fxp.scale(0.5),
    fxp.joint("tail.*", fxp.where(nn.Linear, "bias")): fxp.subspace(dim=7),
    "decoder.weight": fxp.ref("encoder.weight", "x.original") >> fxp.transpose(0, 1),
}


@pytest.mark.parametrize("ending", ["yaml", "yml", "json"])
def test_files_carry_everything_made_of_catalogue_entries(tmp_path, ending: str) -> None:
    spec = fxp.Spec(FULL)
    spec.save(tmp_path / f"spec.{ending}")
    again = fxp.Spec.load(tmp_path / f"spec.{ending}")
    assert again == spec and list(again) == list(spec)
    assert isinstance(list(again)[1], Regex) and isinstance(list(again)[3], Joint)
    json.dumps(spec.to_dict())


def test_code_cannot_be_written_to_a_file() -> None:
    with pytest.raises(SpecError, match="is code, which a spec file cannot carry"):
        fxp.Spec({"*": torch.tanh}).to_dict()
    with pytest.raises(SpecError, match="predicate .* is code"):
        fxp.Spec({lambda name, tensor, owner: True: fxp.skew()}).to_dict()
    with pytest.raises(SpecError, match="names a class outside torch.nn"):
        fxp.Spec({fxp.where(Net): fxp.skew()}).to_dict()


def one_rule(select: object, declare: object) -> dict[str, object]:
    return {"version": 1, "rules": [{"select": select, "declare": declare}]}


BROKEN = [
    ([], "not a spec"),
    ({"version": 2, "rules": []}, "spec version 2; this fxparam reads version 1"),
    ({"version": 1, "rules": ["x"]}, "rule 1: expected a mapping with the keys 'select' and 'declare'"),
    (one_rule("a", "orthogonl"), r"rule 1: no catalogue entry 'orthogonl'; did you mean orthogonal"),
    (one_rule("a", {"os.system": "x"}), "rule 1: got the declaration"),
    (one_rule("a", {"os.system": {"x": 1}}), "rule 1: no catalogue entry 'os.system'"),
    (one_rule({"where": ["functional", "weight"]}, "skew"), "is no module class of torch.nn"),
    (one_rule({"regex": "("}, "skew"), "rule 1: "),
    (one_rule("a", []), "rule 1: 'declare' is an empty list"),
    (one_rule("a", {"mask": {"colour": 1}}), "rule 1: .*colour"),
    ({"version": 1, "rules": [{"select": "a", "declare": "skew"}] * 2}, "rule 2: a second rule with the selector 'a'"),
]


@pytest.mark.parametrize(("data", "message"), BROKEN, ids=range(len(BROKEN)))
def test_broken_files_name_the_rule(data: object, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        fxp.Spec.from_dict(data)  # type: ignore[arg-type]


def test_files_that_are_no_yaml_or_json(tmp_path) -> None:
    (tmp_path / "a.yaml").write_text("rules: [")
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "c.yaml").write_text("!!python/object/apply:os.getcwd []")
    with pytest.raises(SpecError, match="is not valid YAML"):
        fxp.Spec.load(tmp_path / "a.yaml")
    with pytest.raises(SpecError, match="is not valid JSON"):
        fxp.Spec.load(tmp_path / "b.json")
    with pytest.raises(SpecError, match="is not valid YAML"):
        fxp.Spec.load(tmp_path / "c.yaml")
    with pytest.raises(SpecError, match=r"got 'd.toml'; a spec file ends in .yaml, .yml or .json"):
        fxp.Spec.load(tmp_path / "d.toml")


def test_a_type_that_the_model_does_not_have_is_named() -> None:
    with pytest.raises(SpecError, match=r"matches nothing; the model has no Conv2d with parameters or buffers"):
        chosen(Net(), fxp.where(nn.Conv2d))


@pytest.mark.parametrize("flags", [re.IGNORECASE, re.IGNORECASE | re.DOTALL, re.NOFLAG])
def test_flags_of_a_regex_survive_a_file(flags: re.RegexFlag) -> None:
    spec = fxp.Spec({re.compile("ENCODER.*", flags): fxp.skew()})
    (again,) = fxp.Spec.from_dict(spec.to_dict())
    assert isinstance(again, Regex)
    assert again.pattern.flags == re.compile("ENCODER.*", flags).flags
