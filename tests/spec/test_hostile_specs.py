"""Spec files from anyone: they are read as a spec or refused with a ``SpecError``, nothing is run, nothing hangs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import fxparam as fxp
from fxparam.catalogue import ENTRIES
from fxparam.errors import SpecError

HEAD = "version: 1\nrules:\n  - select: a\n    declare: "


def rule(declare: Any, select: Any = "a") -> dict[str, Any]:
    return {"version": 1, "rules": [{"select": select, "declare": declare}]}


def options_of(name: str) -> list[str]:
    entry: Any = ENTRIES[name]
    return [field.name for field in dataclasses.fields(entry) if field.init]


def refused(read: Any, seconds: float = 5) -> str:
    """The text of the ``SpecError``, after checking that it came soon and can be read."""
    start = time.perf_counter()
    with pytest.raises(SpecError) as caught:
        read()
    assert time.perf_counter() - start < seconds
    assert 0 < len(str(caught.value)) < 3000
    return str(caught.value)


# ---- files -----------------------------------------------------------------------------------------------------------

TAGS = [
    "!!python/object/apply:os.mkdir [MARK]",
    "!!python/object/new:os.mkdir [MARK]",
    "!!python/object/apply:subprocess.check_call [[mkdir, MARK]]",
    "!!python/name:os.mkdir",
    "!!python/module:os",
    "!!python/object:fxparam.declaration.Custom {map: 1}",
    "!!python/tuple [1, 2]",
    "{ball: {radius: !!python/object/apply:os.mkdir [MARK]}}",
    "{? !!python/object/apply:os.mkdir [MARK] : 1}",
    "!<tag:yaml.org,2002:python/object/apply:os.mkdir> [MARK]",
    "!own {a: 1}",
]


@pytest.mark.parametrize("text", TAGS)
def test_tags_are_refused_and_nothing_is_run(tmp_path: Path, text: str) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "a.yaml").write_text(HEAD + text.replace("MARK", os.fspath(mark)))
    assert "is not valid YAML" in refused(lambda: fxp.Spec.load(tmp_path / "a.yaml"))
    assert not mark.exists()


def laughs(last: str, item: str) -> str:
    """Thirty anchors, each of which holds the one before twice: a billion in all."""
    levels = [f"a{i}: &a{i} {item.format(f'*a{i - 1}')}" for i in range(1, 31)]
    return "a0: &a0 {x: 1}\n" + "\n".join(levels) + f"\nversion: 1\nrules: {last}\n"


BOMBS = {
    "aliases of lists": laughs("[{select: a, declare: *a30}]", "[{0}, {0}]"),
    "aliases in a selector": laughs("[{select: *a30, declare: skew}]", "[{0}, {0}]"),
    "aliases in an option": laughs("[{select: a, declare: {ball: {radius: *a30}}}]", "[{0}, {0}]"),
    "aliases of mappings": laughs("*a30", "{{b: {0}, c: {0}}}"),
    "merges": laughs("*a30", "{{<<: [{0}, {0}]}}"),
    "a list in itself": HEAD + "&a [*a]",
    "a selector in itself": "version: 1\nrules:\n  - select: &a {joint: [*a]}\n    declare: skew\n",
    "an option in itself": HEAD + "{ball: {radius: &a [*a]}}",
    "an entry in itself": HEAD + "&a {ball: *a}",
    "900 brackets": HEAD + "[" * 900 + "]" * 900,
    "150 joints": "version: 1\nrules:\n  - select: " + "{joint: [" * 150 + "a" + "]}" * 150 + "\n    declare: skew\n",
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_little_text_that_stands_for_much(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    message = refused(lambda: fxp.Spec.load(tmp_path / "a.yaml"))
    assert "a.yaml" in message and ("counting each alias" in message or "deep" in message or "recursion depth" in message)


def test_aliases_that_stand_for_little_are_read(tmp_path: Path) -> None:
    text = (
        "version: 1\nrules:\n  - {select: a, declare: {ball: &b {radius: 2}}}\n  - {select: b, declare: {sphere: {<<: *b}}}\n"
    )
    (tmp_path / "a.yaml").write_text(text)
    assert fxp.Spec.load(tmp_path / "a.yaml") == fxp.Spec({"a": fxp.ball(radius=2), "b": fxp.sphere(radius=2)})


def test_what_save_writes_with_aliases_is_read(tmp_path: Path) -> None:
    shared = fxp.weight_norm(dim=None) >> fxp.scale(0.5)
    spec = fxp.Spec({str(i): shared for i in range(5)})
    spec.save(tmp_path / "a.yaml")
    assert fxp.Spec.load(tmp_path / "a.yaml") == spec


TEXTS = {
    "yaml": {
        '{ball: {radius: !!int ""}}': "is not valid YAML",  # IndexError in PyYAML, and so on down this list
        '{ball: {radius: !!float ""}}': "is not valid YAML",
        "{ball: {radius: !!bool maybe}}": "is not valid YAML",
        "{ball: {radius: !!timestamp never}}": "is not valid YAML",
        "2020-99-99": "is not valid YAML",
        "{[a]: b}": "is not valid YAML",
        "{<<: 1}": "is not valid YAML",
        "=": "is not valid YAML",
        f"{{ball: {{radius: 1{'0' * 6000}}}}}": "is not valid YAML",
        f"{{ball: {{radius: 0x{'f' * 6000}}}}}": "rule 1: ball: got ",
        f"{{ball: {{radius: 1{'0' * 400}}}}}": "rule 1: ball: got ",
        f"{{ball: {{radius: 1:{':'.join(['59'] * 400)}}}}}": "rule 1: ball: got ",
        "{ball: {radius: .nan}}": "rule 1: ball: got radius=nan",
        "{ball: {radius: .inf}}": "rule 1: ball: got radius=inf",
        "{ball: {radius: yes}}": "rule 1: ball: got radius=True",
        "{ball: {radius: 1, radius: 2}}": "the key 'radius' stands twice in one mapping",
        "{ball: {}, ball: {}}": "the key 'ball' stands twice in one mapping",
        "{ball: {yes: 1}}": "rule 1: got the declaration",
        "!!binary YQ==": "rule 1: got the declaration b'a'",
        "!!set {a, b}": "rule 1: got the declaration",
        "x" * 300_000: "rule 1: no catalogue entry 'xxx",
        "a\nb: 2\n---\nc: 3": "is not valid YAML",
        "'\x00'": "is not valid YAML",
    },
    "json": {
        '{"version": 1, "rules": [], "rules": []}': "the key 'rules' stands twice in one mapping",
        '{"version": true, "rules": []}': "spec version True; this fxparam reads version 1",
        '{"version": 1.0, "rules": []}': "spec version 1.0; this fxparam reads version 1",
        '{"version": NaN, "rules": []}': "spec version nan; this fxparam reads version 1",
        "[" * 100_000: "is not valid JSON",
        "": "is not valid JSON",
        "null": "not a spec",
        "\ufeff{}": "is not valid JSON",
        json.dumps(rule({"ball": {"radius": 10**4000}})): "rule 1: ball: got ",
        json.dumps(rule({"ball": {"radius": float("-inf")}})): "rule 1: ball: got radius=-inf",
        json.dumps(rule("\ud800")): "rule 1: no catalogue entry",
    },
}
CASES = [(kind, text, message) for kind, cases in TEXTS.items() for text, message in cases.items()]


@pytest.mark.parametrize(("kind", "text", "message"), CASES, ids=range(len(CASES)))
def test_odd_texts(tmp_path: Path, kind: str, text: str, message: str) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_text((HEAD if kind == "yaml" else "") + text, encoding="utf-8")
    assert message in refused(lambda: fxp.Spec.load(path))


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_bytes_that_are_no_text(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"a.{kind}").write_bytes(b"\xff\xfe\x00")
    assert f"is not valid {kind.upper()}: 'utf-8' codec can't decode" in refused(lambda: fxp.Spec.load(tmp_path / f"a.{kind}"))


def test_a_failing_write_keeps_the_old_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.yaml"
    fxp.Spec({"a": fxp.skew()}).save(path)
    before = path.read_bytes()
    for culprit in ("fsync", "replace"):
        with monkeypatch.context() as patch:

            def full(*_: Any) -> None:
                raise OSError(28, "No space left on device")

            patch.setattr(os, culprit, full)
            with pytest.raises(OSError, match="No space left"):
                fxp.Spec({"b": fxp.skew()}).save(path)
        assert [file.name for file in tmp_path.iterdir()] == ["a.yaml"] and path.read_bytes() == before


def test_a_spec_is_saved_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").symlink_to(tmp_path / "real.yaml")
    fxp.Spec({"a": fxp.skew()}).save(tmp_path / "a.yaml")
    assert (tmp_path / "a.yaml").is_symlink() and len(fxp.Spec.load(tmp_path / "real.yaml")) == 1


SOURCE = yaml.safe_dump(fxp.Spec({"a": fxp.mask(density=0.5), fxp.joint("b", "c"): fxp.subspace(dim=3)}).to_dict()).encode()


@given(st.data())
def test_damaged_yaml(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    content = bytearray(SOURCE)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(
            st.sampled_from([b"*", b"&", b"!", b": ", b"\t", b"-", b""])
        )
    path.write_bytes(content)
    with contextlib.suppress(SpecError):
        fxp.Spec.load(path)


# ---- values ----------------------------------------------------------------------------------------------------------

SELECTORS: list[Any] = [
    None,
    1,
    [],
    {},
    {"regex": "("},
    {"regex": "(" * 5000 + ")" * 5000},
    {"regex": "a{99999999999}"},
    {"regex": 1},
    {"regex": "a", "flags": 1},
    {"where": ["Linear"]},
    {"where": ["__class__", "weight"]},
    {"where": ["__dict__", "weight"]},
    {"where": ["functional", "weight"]},
    {"where": ["Linear", 1]},
    {"joint": []},
    {"joint": [{"joint": ["a"]}]},
    {"predicate": "print"},
]


@pytest.mark.parametrize("select", SELECTORS, ids=range(len(SELECTORS)))
def test_odd_selectors(select: Any) -> None:
    assert refused(lambda: fxp.Spec.from_dict(rule("skew", select))).startswith("rule 1: ")


def test_values_that_hold_each_other() -> None:
    ring: list[Any] = []
    ring.append(ring)
    bomb: Any = 1
    for _ in range(40):
        bomb = [bomb, bomb]
    for value in (ring, bomb, {"ball": {"radius": bomb}}):
        assert refused(lambda value=value: fxp.Spec.from_dict(rule(value))).startswith("not a spec: ")
    assert refused(lambda: fxp.Spec.from_dict(ring)).startswith("not a spec: ")  # type: ignore[arg-type]


ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    2,
    10**40,
    10**400,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    [],
    [1],
    [[1]],
    [None],
    ["a", 1],
    {},
    {"a": 1},
]


@pytest.mark.parametrize("name", ENTRIES)
def test_options_of_every_entry(name: str) -> None:
    """Each option of each entry with each odd value: taken, or refused in a message that names rule and entry."""
    own = options_of(name)
    for option in (*own, "__class__", "__init__", "self", "name", "build", ""):
        for value in ODD:
            try:
                spec = fxp.Spec.from_dict(rule({name: {option: value}}))
            except SpecError as error:
                assert str(error).startswith(f"rule 1: {name}: "), error
                assert option in own or f"got the option {option!r}; expected " in str(error)
            else:
                assert option in own and repr(spec)
    for wrong in (None, 1, "x", [1], {1: 2}):
        assert refused(lambda wrong=wrong: fxp.Spec.from_dict(rule({name: wrong}))).startswith("rule 1: got the declaration")


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, "cayley", -(2**63)]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from([*ENTRIES, "ref", "existing", "__class__", "custom"])


@given(st.data(), names, plain)
def test_drawn_options(data: st.DataObject, name: str, other: Any) -> None:
    own = options_of(name) if name in ENTRIES else []
    options = {option: data.draw(plain) for option in own if data.draw(st.booleans())}
    for declare in ({name: options}, {name: other}, [name, {name: options}], other):
        with contextlib.suppress(SpecError):
            fxp.Spec.from_dict(rule(declare))


@given(plain)
def test_drawn_specs(value: Any) -> None:
    for data in (value, {"version": 1, "rules": value}, {"version": 1, "rules": [value]}, rule("skew", value)):
        with contextlib.suppress(SpecError):
            fxp.Spec.from_dict(data)


def test_missing_options_are_named() -> None:
    assert refused(lambda: fxp.Spec.from_dict(rule("banded"))) == (
        "rule 1: banded: the option lower is missing; type {banded: {lower: ...}}"
    )
    assert refused(lambda: fxp.Spec.from_dict(rule({"mask": {"colour": 1}}))).startswith(
        "rule 1: mask: got the option 'colour'; expected density, "
    )
