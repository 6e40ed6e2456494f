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
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn

from fxparam.catalogue import ENTRIES
from fxparam.declaration import Chain, Custom, Declaration, Entry, Existing, Ref, steps_of
from fxparam.errors import SpecError, missing_extra
from fxparam.spec.selectors import Glob, Joint, Predicate, Regex, Selector, Where

VERSION = 1
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
    if not isinstance(data, Mapping) or set(data) != {"version", "rules"} or not isinstance(data["rules"], list):
        raise SpecError("not a spec: expected a mapping with the keys 'version' and 'rules' (a list)")
    if data["version"] != VERSION:
        raise SpecError(f"spec version {data['version']!r}; this fxparam reads version {VERSION}")
    rules: dict[Selector, Declaration] = {}
    for number, rule in enumerate(data["rules"], 1):
        if not isinstance(rule, Mapping) or set(rule) != {"select", "declare"}:
            raise SpecError(f"rule {number}: expected a mapping with the keys 'select' and 'declare', got {rule!r}")
        try:
            key = _select_in(rule["select"])
            steps = rule["declare"] if isinstance(rule["declare"], list) else [rule["declare"]]
            built = tuple(_declare_in(step) for step in steps)
        except (SpecError, TypeError, ValueError, re.error) as error:
            raise SpecError(f"rule {number}: {error}") from error
        if not built:
            raise SpecError(f"rule {number}: 'declare' is an empty list")
        if key in rules:
            raise SpecError(f"rule {number}: a second rule with the selector {key}")
        rules[key] = built[0] if len(built) == 1 else Chain(built)
    return rules


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Write plain values as YAML or JSON, by the ending of the path."""
    if _kind(path) == "json":
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    else:
        path.write_text(_yaml().safe_dump(dict(data), sort_keys=False), encoding="utf-8")


def read(path: Path) -> Any:
    """Read plain values from YAML or JSON, by the ending of the path."""
    kind = _kind(path)
    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text) if kind == "json" else _yaml().safe_load(text)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{path} is not valid JSON: {error}") from error
    except Exception as error:
        # PyYAML's errors are known only where PyYAML is installed.
        if kind == "yaml" and isinstance(error, _yaml().YAMLError):
            raise SpecError(f"{path} is not valid YAML: {error}") from error
        raise


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
    raise SpecError(f"got the selector {data!r}; expected a glob, {{regex: ...}}, {{where: [Type, name]}} or {{joint: [...]}}")


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
    raise SpecError(f"got the declaration {data!r}; expected the name of a catalogue entry or {{name: {{option: value}}}}")


def _entry(name: str, options: Mapping[str, Any]) -> Declaration:
    if name not in ENTRIES:
        near = get_close_matches(name, ENTRIES, 3)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(sorted(ENTRIES))}"
        raise SpecError(f"no catalogue entry {name!r}{hint}")
    # Lists come back from files where options are tuples.
    return ENTRIES[name](**{key: tuple(value) if isinstance(value, list) else value for key, value in options.items()})
