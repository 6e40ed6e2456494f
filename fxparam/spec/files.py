"""Specs as plain data: YAML and JSON files that can name catalogue entries and nothing else.

version: 1
rules:
  - select: rnn.weight_hh_l*
    declare: {orthogonal: {map: cayley}}
  - select: {where: [Conv1d, weight]}
    declare: [{weight_norm: {dim: 0}}, {mask: {density: 0.5}}]
  - select: {joint: ["head.*"]}
    declare: {subspace: {dim: 750}}
  - select: decoder.weight
    declare: [{ref: [encoder.weight]}, transpose]
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import secrets
from collections.abc import Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn

from fxparam.catalogue import ENTRIES
from fxparam.declaration import Chain, Custom, Declaration, Entry, Existing, Ref, steps_of
from fxparam.errors import FxparamError, SpecError, missing_extra
from fxparam.spec.selectors import Glob, Joint, Predicate, Regex, Selector, Where

VERSION = 1
DEPTH, SIZE = 64, 2**24
"""How deep a spec may be nested, and how many values it may hold where each alias counts as all that it stands for."""

_FLAGS = {"a": re.ASCII, "i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL, "x": re.VERBOSE}


def to_dict(rules: Mapping[Selector, Declaration]) -> dict[str, Any]:
    """Rules as plain values; see ``fxparam.Spec.to_dict``."""
    return {
        "version": VERSION,
        "rules": [
            {"select": _select_out(key), "declare": _unwrap([_declare_out(step, key) for step in steps_of(value)])}
            for key, value in rules.items()
        ],
    }


def from_dict(data: Mapping[str, Any]) -> dict[Selector, Declaration]:
    """Plain values as rules; see ``fxparam.Spec.from_dict``."""
    _check_extent(data)
    if not isinstance(data, Mapping) or set(data) != {"version", "rules"} or not isinstance(data["rules"], list):
        raise SpecError("not a spec: expected a mapping with the keys 'version' and 'rules' (a list)")
    if type(data["version"]) is not int or data["version"] != VERSION:
        raise SpecError(f"spec version {_brief(data['version'])}; this fxparam reads version {VERSION}")
    rules: dict[Selector, Declaration] = {}
    for number, rule in enumerate(data["rules"], 1):
        if not isinstance(rule, Mapping) or set(rule) != {"select", "declare"}:
            raise SpecError(f"rule {number}: expected a mapping with the keys 'select' and 'declare', got {_brief(rule)}")
        try:
            key = _select_in(rule["select"])
            steps = rule["declare"] if isinstance(rule["declare"], list) else [rule["declare"]]
            built = tuple(_declare_in(step) for step in steps)
        except Exception as error:  # re.compile alone has three kinds
            text = str(error) or type(error).__name__
            raise SpecError(f"rule {number}: {text if len(text) <= 2000 else text[:2000] + '...'}") from error
        if not built:
            raise SpecError(f"rule {number}: 'declare' is an empty list")
        if key in rules:
            raise SpecError(f"rule {number}: a second rule with the selector {key}")
        rules[key] = built[0] if len(built) == 1 else Chain(built)
    return rules


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Write plain values as YAML or JSON, by the ending of the path; a file that is there is replaced whole or not at all."""
    text = json.dumps(data, indent=2) + "\n" if _kind(path) == "json" else _yaml().safe_dump(dict(data), sort_keys=False)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            temporary.chmod(target.stat().st_mode & 0o7777)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> Any:
    """Read plain values from YAML or JSON, by the ending of the path."""
    kind = _kind(path)
    content = path.read_bytes()
    load = _load_json if kind == "json" else _load_yaml
    if kind == "yaml":
        _yaml()  # that it is not installed is no fault of the file
    try:
        return load(content.decode())
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from error
    except Exception as error:  # PyYAML raises IndexError, KeyError and others, besides its own, for `!!int ""` and the like
        text = str(error) or type(error).__name__
        raise SpecError(f"{path} is not valid {kind.upper()}: {text[:2000]}") from error


def _load_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_distinct)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping, unless a key stands in it twice: the first would be lost without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise SpecError(f"the key {_brief(next(k for k in keys if keys.count(k) > 1))} stands twice in one mapping")
    return found


def _load_yaml(text: str) -> Any:
    """What ``yaml.safe_load`` gives, after a look at the nodes: it expands ``<<`` before anybody could count."""
    yaml = _yaml()
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_extent(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _children(value: Any) -> list[Any]:
    """What a list, a mapping or a node of YAML holds."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    held: Any = getattr(value, "value", None)  # of a YAML node: a text, nodes, or pairs of nodes
    if getattr(value, "id", None) == "mapping":
        _distinct([(key.value, None) for key, _ in held if isinstance(key.value, str) and key.value != "<<"])
        return [part for pair in held for part in pair]
    return list(held) if isinstance(held, list) else []


def _check_extent(data: Any) -> None:
    """Refuse what no spec needs and what would fill the memory: deep nesting, cycles, aliases of aliases.

    Raises:
        SpecError: it is nested more than ``DEPTH`` deep, or holds more than ``SIZE`` values, each alias counted in full.
    """
    sizes: dict[int, int] = {}

    def size(value: Any, depth: int) -> int:
        if depth > DEPTH:
            raise SpecError(f"not a spec: lists and mappings lie in each other more than {DEPTH} deep, or in themselves")
        if id(value) not in sizes:
            total = 1 + sum(size(child, depth + 1) for child in _children(value))
            if total > SIZE:
                raise SpecError(f"not a spec: it holds more than {SIZE:,} values, counting each alias as all it stands for")
            sizes[id(value)] = total
        return sizes[id(value)]

    size(data, 0)


def _brief(value: Any) -> str:
    """A value as it is shown in an error: some of a long one."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 200
    short.maxlevel = 4
    try:
        return short.repr(value)
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        return f"a {type(value).__name__} too long to print"


def _kind(path: Path) -> str:
    kinds = {".json": "json", ".yaml": "yaml", ".yml": "yaml"}
    if path.suffix not in kinds:
        raise SpecError(f"got {path.name!r}; a spec file ends in .yaml, .yml or .json")
    return kinds[path.suffix]


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise missing_extra("pyyaml", "yaml", "to read and write YAML specs") from error
    return yaml


def _unwrap(steps: list[Any]) -> Any:
    return steps[0] if len(steps) == 1 else steps


def _select_out(key: Selector) -> Any:
    match key:
        case Glob(pattern):
            return pattern
        case Regex(pattern):
            letters = "".join(letter for letter, flag in _FLAGS.items() if pattern.flags & flag)
            return {"regex": f"(?{letters}){pattern.pattern}" if letters else pattern.pattern}
        case Where(module_type, name_glob) if getattr(nn, module_type.__name__, None) is module_type:
            return {"where": [module_type.__name__, name_glob]}
        case Joint(parts):
            return {"joint": [_select_out(part) for part in parts]}
        case Where():
            raise SpecError(f"{key} names a class outside torch.nn, which a spec file cannot; select by name instead")
        case Predicate() | _:
            raise SpecError(f"{key} is code, which a spec file cannot carry; select by name or type instead")


def _select_in(data: Any) -> Selector:
    match data:
        case str():
            return Glob(data)
        case {"regex": str(pattern), **rest} if not rest:
            return Regex(re.compile(pattern))
        case {"where": [str(name), str(name_glob)], **rest} if not rest:
            module_type = getattr(nn, name, None)
            if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
                raise SpecError(f"where: {name!r} is no module class of torch.nn")
            return Where(module_type, name_glob)
        case {"joint": list(parts), **rest} if not rest:
            return Joint(tuple(_select_in(part) for part in parts))
    raise SpecError(
        f"got the selector {_brief(data)}; expected a glob, {{regex: ...}}, {{where: [Type, name]}} or {{joint: [...]}}"
    )


def _declare_out(step: Declaration, key: Selector) -> Any:
    match step:
        case Entry():
            options = step.options()
            return {step.name: options} if options else step.name
        case Ref(targets):
            return {"ref": list(targets)}
        case Existing():
            return "existing"
        case Custom() | _:
            raise SpecError(f"rule {key}: {step!r} is code, which a spec file cannot carry; use catalogue entries")


def _declare_in(data: Any) -> Declaration:
    match data:
        case "existing":
            return Existing()
        case str(name):
            return _entry(name, {})
        case {"ref": [*targets], **rest} if not rest and targets and all(isinstance(t, str) for t in targets):
            return Ref(tuple(targets))
        case {**single} if len(single) == 1:
            entry, options = next(iter(single.items()))
            if isinstance(entry, str) and isinstance(options, Mapping) and all(isinstance(key, str) for key in options):
                return _entry(entry, options)
    raise SpecError(
        f"got the declaration {_brief(data)}; expected the name of a catalogue entry or {{name: {{option: value}}}}"
    )


def _entry(name: str, options: Mapping[str, Any]) -> Declaration:
    if name not in ENTRIES:
        near = get_close_matches(name[:100], ENTRIES, 3)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(sorted(ENTRIES))}"
        raise SpecError(f"no catalogue entry {_brief(name)}{hint}")
    known = {field.name: field for field in fields(ENTRIES[name]) if field.init}  # type: ignore[arg-type]
    if unknown := [option for option in options if option not in known]:
        raise SpecError(f"{name}: got the option {_brief(unknown[0])}; expected {', '.join(known) or 'none'}")
    needed = [f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [option for option in needed if option not in options]:
        raise SpecError(f"{name}: the option {missing[0]} is missing; type {{{name}: {{{missing[0]}: ...}}}}")
    # Lists come back from files where options are tuples.
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    try:
        return ENTRIES[name](**given)
    except FxparamError:
        raise
    except Exception as error:  # what no check thought of, such as an integer too large for a float
        raise SpecError(f"{name}: got {_brief(given)}, which it cannot take: {error}") from error
