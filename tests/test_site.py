"""The documentation site's sources, without building it (`make docs` does): nothing public is missing, every page is
in the navigation, and what is written for GitHub is read as it was meant."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import fasttransfer
from benchmarks import results
from website import docstrings, github, performance

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fasttransfer"
DOCS = ROOT / "docs"


def documented():
    return [
        name
        for page in (DOCS / "api").glob("*.md")
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
    ]


def public_modules():
    """Modules with `__all__`, and those that the docstring of their subpackage names."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        tree = ast.parse(path.read_text())
        listed = next(
            (ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)
             and getattr(node.targets[0], "id", "") == "__all__"), None,
        )  # fmt: skip
        if path.parent == PACKAGE and path.stem == "__init__":
            continue  # its own test
        if listed is not None:
            yield name.removesuffix(".__init__"), listed
        elif path.parent != PACKAGE and path.stem != "__init__":
            about = ast.get_docstring(ast.parse((path.parent / "__init__.py").read_text())) or ""
            if name in about:
                kinds = (ast.FunctionDef, ast.ClassDef)
                yield (
                    name,
                    [n.name for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")],
                )


def test_every_public_name_has_its_place():
    names = documented()
    twice = {name for name in names if names.count(name) > 1}
    assert not twice
    expected = {f"fasttransfer.{name}" for name in fasttransfer.__all__}
    assert expected - set(names) == set(), "fasttransfer.__all__ has names that docs/api/ has not"


def test_every_public_name_of_the_submodules_has_its_place():
    modules = dict(public_modules())
    compat = {name for name in modules if name.startswith("fasttransfer.compat.")}
    assert len(compat) == 5
    assert "fasttransfer.checkpoints" in modules
    expected = {f"{module}.{name}" for module, names in modules.items() for name in names}
    assert expected - set(documented()) == set(), "docs/api/ lacks names"


def navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    block = text[text.index("\nnav:") : text.index("\ntheme:")]
    return re.findall(r": (\S+\.md)$", block, re.MULTILINE)


def test_navigation():
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    made = {*github.ELSEWHERE.values(), "performance.md"}
    named = navigation()
    assert len(named) == len(set(named))
    assert set(named) == pages | made


def test_committed_results_are_pages(tmp_path, monkeypatch):
    """Each result is a page, with its machine, and is on the summary. (The plots: `make docs`.)"""
    monkeypatch.setattr(performance.report, "write", lambda result, folder: [folder / "report.md"])
    written = performance.pages(tmp_path)
    summary = written.texts["performance.md"]
    assert "not yet measured" in summary
    for path in results.committed():
        result = results.load(path)
        page = written.texts[f"performance/{path.stem}.md"]
        assert result["environment"]["cpu"] in page
        assert f"performance/{path.stem}.md" in summary
        assert all(case["title"] in page for case in result["cases"] if case["about"]["group"] == "one")


@pytest.mark.parametrize(
    "page, folder, repository, before, after",
    [
        ("index.md", "", "", "[docs/parallel.md](docs/parallel.md)", "[parallel](parallel.md)"),
        ("parallel.md", "docs", "", "[a](../README.md#speed)", "[a](index.md#speed)"),
        ("performance/x.md", "", "", "[a](CONTRIBUTING.md)", "[a](../contributing.md)"),
        ("blending.md", "docs", "", "[the code](../Makefile), `a`", "the code, `a`"),
        ("blending.md", "docs", "https://h/r/blob/main", "[m](../Makefile)", "[m](https://h/r/blob/main/Makefile)"),
        ("blending.md", "docs", "", "[gone](nowhere.py)", "[gone](nowhere.py)"),
        ("index.md", "", "", "```\n[a](docs/parallel.md)\n```", "```\n[a](docs/parallel.md)\n```"),
        ("index.md", "", "", r"| `a \| b` | c |", "| `a | b` | c |"),
        ("index.md", "", "", "text:\n- one\n- two", "text:\n\n- one\n- two"),
        ("index.md", "", "", "[x](https://a.b/c) and [y](#here)", "[x](https://a.b/c) and [y](#here)"),
    ],
)  # fmt: skip
def test_markdown_of_the_repository(page, folder, repository, before, after):
    assert github.rewrite(before, page, folder, repository) == after


def test_docstrings_as_markdown():
    table = "===== =======\nname  meaning\n===== =======\n``a`` first\n      line\n===== ======="
    drawn = f"As::\n\n    code\n\n{table}\n\nReturns:\n    A row: it\n    is.\n\nExample:\n    >>> f()"
    assert docstrings.as_markdown(drawn) == (
        "As:\n\n    code\n\n| name | meaning |\n| --- | --- |\n| ``a`` | first line |\n\n"
        "**Returns:**\n\nA row: it\nis.\n\nExamples:\n    >>> f()"
    )
    assert "====" not in docstrings.as_markdown(fasttransfer.kd_loss.__doc__.replace("\n    ", "\n"))
