"""The files that describe the project agree with each other."""

import re
import tomllib

import yaml

from fresh import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))


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
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *conda, by_pip = environment["dependencies"]
    python = next(name for name in conda if name.startswith("python="))
    minimum = PROJECT["requires-python"].removeprefix(">=")
    assert python == f"python={minimum}"
    assert "--constraint constraints.txt" in by_pip["pip"]
    assert "--editable .[book]" in by_pip["pip"]
    assert "jupyterlab" in map(canonical, PROJECT["optional-dependencies"]["book"])


def test_the_repository_has_one_address():
    assert PROJECT["urls"]["Homepage"] == CONFIG["repository"]["url"]


def test_the_formulas_styles_are_those_of_the_renderer():
    from sphinxcontrib.katex import katex_version

    styles = (ROOT / "book/assets/katex/katex.min.css").read_text(encoding="utf-8")
    assert f'content:"{katex_version}"' in styles


def test_the_styles_of_the_formulas_come_with_their_fonts():
    folder = ROOT / "book/assets/katex"
    styles = (folder / "katex.min.css").read_text(encoding="utf-8")
    wanted = set(re.findall(r"url\((fonts/[\w-]+\.woff2)\)", styles))
    assert wanted == {f"fonts/{path.name}" for path in (folder / "fonts").iterdir()}
