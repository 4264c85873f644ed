"""What the documentation shows works: examples in docstrings, Python blocks in Markdown."""

import doctest
import importlib
import inspect
import pkgutil
import re
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

import fastnorm

ROOT = Path(__file__).parents[1]
MARKDOWN = [
    path for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))] if path.exists()
]
FENCE = re.compile(r"^( *)(`{3,})[ \t]*([^\n`]*)\n(.*?)^\1\2`*[ \t]*$", re.DOTALL | re.MULTILINE)
PYTHON = {"python", "py", "python3", "pycon", "Python"}


def module_names() -> list[str]:
    """Every module but those of kernels, whose import needs triton, and of what runs on import."""
    found = [module.name for module in pkgutil.walk_packages(fastnorm.__path__, "fastnorm.")]
    skipped = ("fastnorm.ops", "fastnorm.kernels")
    return ["fastnorm"] + [
        name for name in found if not name.startswith(skipped) and not name.endswith("__main__")
    ]


def public() -> dict[str, object]:
    """The classes and functions that a user meets by name."""
    found = {f"fastnorm.{name}": getattr(fastnorm, name) for name in fastnorm.__all__}
    functional = {
        f"fastnorm.functional.{name}": value
        for name, value in vars(fastnorm.functional).items()
        if inspect.isfunction(value)
        and value.__module__ == "fastnorm.functional"
        and not name.startswith("_")
    }
    parts = {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in (fastnorm.init, fastnorm.signals)
        for name in module.__all__
    }
    return {n: v for n, v in found.items() if not inspect.ismodule(v)} | functional | parts


def blocks(path: Path) -> list[tuple[int, str, str]]:
    """(line, language and what follows it, code) of every fenced block."""
    text = path.read_text()
    return [
        (text.count("\n", 0, match.start(4)) + 1, match[3].strip(), match[4])
        for match in FENCE.finditer(text)
    ]


def python_blocks() -> list[tuple[Path, int, str]]:
    return [
        (path, line, textwrap.dedent(code))
        for path in MARKDOWN
        for line, info, code in blocks(path)
        if info.split()[:1] and info.split()[0] in PYTHON
    ]


@pytest.mark.parametrize("name", module_names())
def test_docstring_examples(name, tmp_path, monkeypatch):
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    result = doctest.testmod(module, raise_on_error=False)
    assert result.failed == 0


def test_docstring_examples_are_found():
    """The test above is not one of modules without examples."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [t for name in module_names() for t in finder.find(importlib.import_module(name))]
    assert sum(len(test.examples) for test in found) >= 20


@pytest.mark.parametrize("name", public())
def test_what_is_public_has_an_example(name):
    docstring = inspect.getdoc(public()[name]) or ""
    assert ">>> " in docstring
    assert "\n" in docstring


@pytest.mark.parametrize(
    ("path", "line", "code"),
    [pytest.param(*b, id=f"{b[0].relative_to(ROOT)}:{b[1]}") for b in python_blocks()],
)
def test_python_blocks(path, line, code, tmp_path, monkeypatch):
    """Each on its own: whoever copies it gets all that it needs."""
    for library in ("lightning", "transformers"):
        if re.search(rf"^(import|from) {library}\b", code, re.MULTILINE):
            pytest.importorskip(library)
            warnings.simplefilter("ignore")  # theirs, within this test
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": "__main__"}
    if code.lstrip().startswith(">>>"):
        parsed = doctest.DocTestParser().get_doctest(
            code, namespace, path.name, str(path), line - 1
        )
        assert doctest.DocTestRunner().run(parsed).failed == 0
    else:
        # padded, so that a traceback shows the line of the file
        exec(compile("\n" * (line - 1) + code, str(path), "exec"), namespace)


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_blocks_cannot_opt_out(path):
    """`python no-run` and the like would hide what has stopped working."""
    for line, info, _ in blocks(path):
        language, *rest = info.split() or [""]
        assert language.lower() not in {name.lower() for name in PYTHON} or not rest, f"line {line}"


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_to_files(path):
    """Relative links and their anchors' files exist."""
    prose = FENCE.sub("", path.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"[a-z]+:|#", target):
            assert (path.parent / target.split("#")[0]).exists(), target


def test_blocks_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "a\n```python\nx = 1\n```\n- b\n  ````py\n  y = '```'\n  ````\n```\nplain\n```\n"
    )
    assert blocks(page) == [
        (3, "python", "x = 1\n"),
        (7, "py", "  y = '```'\n"),
        (10, "", "plain\n"),
    ]
