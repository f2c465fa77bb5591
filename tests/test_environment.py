"""The files that describe the project agree with each other."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import packages_distributions

import nbformat
import pytest
import yaml
from IPython.core.inputtransformer2 import TransformerManager

import executed
import links
from fresh import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONDA = (ROOT / "environment.yml").read_text(encoding="utf-8")
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))

#: What mybinder.org builds environments with.
REPO2DOCKER = "jupyter-repo2docker==2026.4.0"


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name).group()).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonical(name): version for name, version in pairs}


def requirements() -> set[str]:
    extras = PROJECT["optional-dependencies"].values()
    named = [*PROJECT["dependencies"], *(name for extra in extras for name in extra)]
    return {canonical(name) for name in named} - {"gradlab"}


def test_every_requirement_is_pinned():
    assert requirements() - set(pins()) == set()


def test_pins_name_no_local_version():
    assert [version for version in pins().values() if "+" in version] == []


def test_conda_environment_is_the_one_that_make_builds():
    *conda, by_pip = yaml.safe_load(CONDA)["dependencies"]
    python = next(name for name in conda if name.startswith("python="))
    minimum = PROJECT["requires-python"].removeprefix(">=")
    assert python == f"python={minimum}"
    assert "--constraint constraints.txt" in by_pip["pip"]
    assert "--editable .[book]" in by_pip["pip"]
    assert "jupyterlab" in map(canonical, PROJECT["optional-dependencies"]["book"])


def chapters() -> dict[str, set[str]]:
    """A chapter's number, as 06b, to what its code imports: `gradlab`, `gradlab.torch`."""
    found = {}
    for path in executed.notebooks(ROOT):
        cells = nbformat.read(path, as_version=4).cells
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        source = TransformerManager().transform_cell(code)  # also of magics
        names = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        shortened = {".".join(name.split(".")[:length]) for name in names for length in (1, 2)}
        found[path.stem.split("_")[0]] = shortened
    return found


def test_binder_installs_whatever_a_chapter_imports():
    """And not the tests' packages alone, which `make` installs too."""
    *_, by_pip = yaml.safe_load(CONDA)["dependencies"]
    assert [line for line in by_pip["pip"] if not line.startswith("--")] == []
    extras = PROJECT["optional-dependencies"]
    asked = [*PROJECT["dependencies"], *extras["torch"], *extras["tensorflow"], *extras["book"]]
    installed = set(map(canonical, asked)) | {"gradlab"}
    provided_by = packages_distributions()
    for chapter, names in chapters().items():
        for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names:
            by = set(map(canonical, provided_by.get(name, [name])))
            assert by & installed, f"chapter {chapter} imports {name}, which Binder lacks"


@pytest.mark.parametrize(
    ("package", "modules"),
    [
        ("PyTorch", {"torch", "gradlab.torch"}),
        ("TensorFlow", {"tensorflow", "keras", "gradlab.keras"}),
    ],
)
def test_the_conda_environment_says_which_chapters_need_a_framework(package, modules):
    said = re.search(rf"# {package}: every chapter but ([\w, ]+)\.$", CONDA, re.MULTILINE).group(1)
    without = {chapter for chapter, names in chapters().items() if not names & modules}
    assert set(re.split(", | and ", said)) == without


def test_the_index_of_pytorch_for_the_cpu_has_one_address():
    *_, by_pip = yaml.safe_load(CONDA)["dependencies"]
    (index,) = (line.split()[1] for line in by_pip["pip"] if line.startswith("--extra-index-url"))
    for path in (ROOT / "README.md", *(ROOT / ".github/workflows").glob("*.yml")):
        found = re.findall(r"PIP_EXTRA_INDEX_URL[:=]\s*(\S+)", path.read_text(encoding="utf-8"))
        assert found == [index], path


def test_binders_own_program_reads_the_environment(tmp_path):
    """repo2docker, in an environment of its own: of the book nothing else needs it."""
    venv.create(tmp_path, with_pip=True)
    programs = tmp_path / ("Scripts" if os.name == "nt" else "bin")
    pip = [programs / "python", "-m", "pip", "install", "--quiet", REPO2DOCKER]
    subprocess.run(pip, check=True)
    command = [programs / "jupyter-repo2docker", "--no-build", "--debug", ROOT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    version = PROJECT["requires-python"].removeprefix(">=")
    assert f"conda environment for python={version}" in said
    # It installs from this file, and only after the repository, which the file refers to, is there.
    copied, installed = said.index("COPY --chown=0:0 src/ "), said.index('--file "environment.yml"')
    assert copied < installed


#: Files that a reader copies a line from, or a host reads, type the repository's address.
MAY_SAY_THE_ADDRESS = ("*.md", "book/*.md", "*.cff", "pyproject.toml", "_config.yml")
#: Everything else takes it from `_config.yml`.
TAKE_THE_ADDRESS = (
    *("notebooks/*.ipynb", "src/**/*.py", "tools/*.py", "benchmarks/*.py", "tests/**/*.py"),
    *("book/_ext/*.py", "book/_templates/*", "book/assets/*.js", "book/assets/*.css"),
    *(".github/workflows/*.yml", "Makefile", "environment.yml"),
)


def test_the_repository_has_one_address():
    address, branch = CONFIG["repository"]["url"], CONFIG["repository"]["branch"]
    owner, name = address.removeprefix("https://github.com/").split("/")
    assert PROJECT["urls"]["Homepage"] == address
    assert CONFIG["sphinx"]["config"]["ogp_site_url"] == f"https://{owner}.github.io/{name}/"
    expected = {
        r"github\.com/([\w-]+/[\w-]+)": f"{owner}/{name}",
        r"mybinder\.org/v2/gh/([\w/-]+)": f"{owner}/{name}/{branch}",
        r"([\w-]+\.github\.io/[\w-]+)": f"{owner}.github.io/{name}",
    }
    for path in links.files(ROOT, MAY_SAY_THE_ADDRESS):
        text = path.read_text(encoding="utf-8")
        for pattern, one in expected.items():
            assert set(re.findall(pattern, text)) <= {one}, path
    typed = [
        path.relative_to(ROOT)
        for path in links.files(ROOT, TAKE_THE_ADDRESS)
        if re.search(rf"{owner}(/|\.github\.io/){name}", path.read_text(encoding="utf-8"))
    ]
    assert typed == []


def test_the_formulas_styles_are_those_of_the_renderer():
    from sphinxcontrib.katex import katex_version

    styles = (ROOT / "book/assets/katex/katex.min.css").read_text(encoding="utf-8")
    assert f'content:"{katex_version}"' in styles


def test_the_styles_of_the_formulas_come_with_their_fonts():
    folder = ROOT / "book/assets/katex"
    styles = (folder / "katex.min.css").read_text(encoding="utf-8")
    wanted = set(re.findall(r"url\((fonts/[\w-]+\.woff2)\)", styles))
    assert wanted == {f"fonts/{path.name}" for path in (folder / "fonts").iterdir()}
