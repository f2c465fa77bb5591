"""The package as a whole: what an import pulls in, which way imports run, what a lack says."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gradlab

ROOT = Path(gradlab.__file__).resolve().parent
FRAMEWORKS = {"torch", "tensorflow", "keras"}
#: What one framework alone needs: TensorFlow's strategies start no function per process.
TORCH_ONLY = {"parallel.py"}
FREE = sorted(path.stem for path in ROOT.glob("*.py") if not path.stem.startswith("_"))


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def imports(tree: ast.AST, *, inside_functions: bool) -> set[str]:
    """Dotted names that a module imports; optionally only those that its own import triggers."""
    found, todo = set(), [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        skip = isinstance(node, ast.FunctionDef | ast.Lambda) and not inside_functions
        todo += [] if skip else list(ast.iter_child_nodes(node))
    return found


def parsed(path: Path, **keywords) -> set[str]:
    return imports(ast.parse(path.read_text(encoding="utf-8")), **keywords)


def test_the_framework_free_half_imports_no_framework():
    names = ", ".join(f"gradlab.{name}" for name in FREE)
    run = python(
        f"import sys, gradlab, {names}\n"
        f"loaded = {FRAMEWORKS} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", FREE)
def test_no_framework_is_named_outside_its_folder(name):
    tops = {i.split(".")[0] for i in parsed(ROOT / f"{name}.py", inside_functions=True)}
    assert not tops & FRAMEWORKS
    ours = parsed(ROOT / f"{name}.py", inside_functions=False)
    assert not {i for i in ours if i.startswith(("gradlab.torch", "gradlab.keras"))}


@pytest.mark.parametrize(("side", "other"), [("torch", "keras"), ("keras", "torch")])
def test_the_two_sides_know_nothing_of_each_other(side, other):
    foreign = {"torch": {"torch"}, "keras": {"keras", "tensorflow"}}[other]
    for path in (ROOT / side).rglob("*.py"):
        found = parsed(path, inside_functions=True)
        assert not {i for i in found if i.startswith(f"gradlab.{other}")}, path
        assert not {i.split(".")[0] for i in found} & foreign, path


def test_both_sides_have_the_same_names():
    import gradlab.keras
    import gradlab.torch

    assert set(gradlab.torch.__all__) == set(gradlab.keras.__all__) - {"keras"}
    here, there = ({p.name for p in (ROOT / s).glob("[a-z]*.py")} for s in ("torch", "keras"))
    assert here - TORCH_ONLY == there
    for module in sorted(Path(name).stem for name in there):
        one, two = (
            ast.parse((ROOT / side / f"{module}.py").read_text()).body
            for side in ("torch", "keras")
        )
        public = [
            {n.name for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
            for body in (one, two)
        ]
        public = [{n for n in names if not n.startswith("_")} for names in public]
        assert public[0] - {"total_norm"} == public[1], module


def test_modules_come_when_they_are_used():
    run = python(
        "import sys, gradlab\n"
        "assert 'gradlab.theory' not in sys.modules\n"
        "assert gradlab.theory.activation_names()\n"
        "assert 'gradlab.theory' in sys.modules"
    )
    assert run.returncode == 0, run.stderr
    assert set(FREE) <= set(dir(gradlab))
    with pytest.raises(AttributeError, match=r"no attribute 'theroy'; it has .*'theory'"):
        _ = gradlab.theroy


@pytest.mark.parametrize(
    ("side", "missing", "packages"),
    [
        ("torch", "torch", "torch"),
        ("keras", "tensorflow", "tensorflow keras"),
        ("keras", "keras", "tensorflow keras"),
    ],
)
def test_a_missing_framework_is_named_with_what_to_install(side, missing, packages):
    run = python(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] == {missing!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "import gradlab.theory, gradlab.backprop\n"  # the rest works without it
        "try:\n"
        f"    import gradlab.{side}\n"
        "except ImportError as error:\n"
        "    print(error)"
    )
    assert run.returncode == 0, run.stderr
    assert f"gradlab.{side} needs" in run.stdout
    assert f"pip install {packages}" in run.stdout


def test_another_keras_backend_is_refused_with_a_remedy():
    run = python(
        "import sys\n"
        "from types import SimpleNamespace as Fake\n"
        "sys.modules['tensorflow'] = Fake()\n"
        "sys.modules['keras'] = Fake(backend=Fake(backend=lambda: 'jax'))\n"
        "try:\n"
        "    import gradlab.keras\n"
        "except ImportError as error:\n"
        "    print(error)"
    )
    assert "Keras runs on 'jax': set KERAS_BACKEND=tensorflow" in run.stdout, run.stderr


def test_every_public_name_is_documented():
    undocumented = []
    for path in ROOT.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        undocumented += [str(path)] * (ast.get_docstring(tree) is None)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                undocumented += [f"{path.stem}.{node.name}"] * (ast.get_docstring(node) is None)
    assert not undocumented


@pytest.mark.parametrize("module", FREE)
def test_examples_in_docstrings_hold(module):
    import doctest
    import importlib

    result = doctest.testmod(importlib.import_module(f"gradlab.{module}"))
    assert result.failed == 0
