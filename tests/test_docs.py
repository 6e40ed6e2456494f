"""The Python in README.md and docs/ runs, the examples run, docstring examples hold, links lead somewhere.

The code blocks of one page share one namespace and run in order, in an empty directory.
"""

from __future__ import annotations

import doctest
import importlib
import os
import re
import subprocess
import sys
from glob import glob
from pathlib import Path

import pytest
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
DOCTESTS = sorted(  # glob walks through links: passes and exporters come under their one name
    f"fxparam.{path.removesuffix('.py').replace(os.sep, '.')}".removesuffix(".__init__")
    for path in glob("**/*.py", root_dir=ROOT / "fxparam", recursive=True)
    if ">>> " in (ROOT / "fxparam" / path).read_text(encoding="utf-8")
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = Document.parse(str(page), PythonCodeBlockParser(), SkipParser())
    monkeypatch.chdir(tmp_path)
    for block in document.examples():
        block.evaluate()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\((?![a-z]+:|#)([^)\s#]+)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing, f"{name(page)} links to {missing}"


@pytest.mark.parametrize("module", DOCTESTS)
def test_docstring_examples_hold(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert tried and not failed


@pytest.mark.parametrize("example", EXAMPLES, ids=name)
def test_example_runs(example: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(example)],
        cwd=tmp_path,
        env={**os.environ, "FXPARAM_EXAMPLE_QUICK": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
