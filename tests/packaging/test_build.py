"""From the source tree to an installed package: sdist, wheel, clean virtual environments, a failing compiler.

Everything is built from a copy of the tree, so the checkout and its `.venv` stay as they are. pip may reach for the
package index: for the build's requirements and for fasttun's own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERSION = re.findall(r'^__version__ = "(.+)"', (ROOT / "fasttun" / "_version.py").read_text(), re.M)[0]
# What a build from the checkout may leave in it, and what is no part of the source.
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache", ".hypothesis", ".benchmarks"
)


def run(*command: str | Path, expect: int = 0, **environment: str) -> str:
    """Output and errors of `command`, run outside the source tree; fails the test unless its status is `expect`."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(word) for word in command], cwd="/", env=clean | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
    )
    assert done.returncode == expect, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def pip(python: Path, *arguments: str | Path, expect: int = 0, **environment: str) -> str:
    """This environment's pip, acting on the environment of `python`."""
    common = ("--python", python, "--disable-pip-version-check", "--no-input")
    return run(sys.executable, "-m", "pip", *common, *arguments, expect=expect, **environment)


def new_environment(directory: Path, python: str = sys.executable) -> Path:
    """Makes an empty virtual environment; returns its interpreter."""
    run(python, "-m", "venv", "--without-pip", directory)
    return directory / "bin" / "python"


def other_pythons() -> dict[str, str]:
    """Interpreters of the supported versions other than the running one, in PATH or pyenv's: version to path.

    The running one where there is no other, so that a build in isolation is tested on every machine.
    """
    supported = [f"3.{minor}" for minor in range(10, 15) if minor != sys.version_info.minor]
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [path for v in supported for path in sorted(versions.glob(f"{v}.*/bin/python{v}"))]
    candidates += [Path(path) for v in supported if (path := shutil.which(f"python{v}"))]
    question = (
        "import os, sys, sysconfig as s; print('%d.%d' % sys.version_info[:2], sys.executable,"
        " sys.version_info.releaselevel, os.path.exists(s.get_path('include') + '/Python.h'))"
    )
    found: dict[str, str] = {}
    for candidate in candidates:
        asked = subprocess.run([candidate, "-Ic", question], capture_output=True, text=True, check=False)
        answer = asked.stdout.split()
        if len(answer) == 4 and answer[0] in supported and answer[2:] == ["final", "True"]:
            found.setdefault(answer[0], answer[1])
    return found or {"{}.{}".format(*sys.version_info): sys.executable}


OTHER_PYTHONS = other_pythons()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, as `git clone` would give it."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "fasttun", symlinks=True, ignore=NOT_SOURCE)


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", target, source)
    return target / f"fasttun-{VERSION}.tar.gz"


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the sdist, not from the tree, so that a file the sdist lacks is noticed."""
    target = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", target, sdist)
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a clean environment in which the wheel, and what it requires, is installed."""
    python = new_environment(tmp_path_factory.mktemp("installed") / "env")
    pip(python, "install", "-q", wheel)
    return python


def test_sdist_holds_the_sources_and_nothing_built(sdist: Path, source: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tree = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    folders = ("bench/", "contrib/", "docs/", "examples/", "fasttun/", "packaging/", "scripts/", "tests/", ".ci/")
    kept = {name for name in tree if name.startswith(folders)}
    kept |= {"CHANGELOG.md", "LICENSE", "Makefile", "README.md", "mkdocs.yml", "pyproject.toml", "setup.py"}
    assert not kept - names, "in the tree, not in the sdist"
    generated = ("fasttun/_core.c", "fasttun/_testing.c")
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc")) or name in generated]
    assert not [name for name in names if name.startswith(("build/", ".git/", ".venv/"))]


def test_wheel_holds_what_an_import_and_a_type_checker_need(wheel: Path, source: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        baseline = archive.read("fasttun/demo/pure_python.py")
    assert {"fasttun/py.typed", "fasttun/_core.pyi"} <= names
    assert [name for name in names if re.fullmatch(r"fasttun/_core\..*\.so", name)]
    modules = {path.relative_to(source).as_posix() for path in (source / "fasttun").rglob("*.py")}
    assert modules <= names
    assert {name.partition("/")[0] for name in names} == {"fasttun", f"fasttun-{VERSION}.dist-info"}
    assert not [name for name in names if name.endswith((".c", ".o"))]
    assert baseline == (source / "bench" / "pure_python.py").read_bytes(), "the demonstration's baseline is a copy"


def test_wheel_works_in_a_clean_environment(installed: Path) -> None:
    command = installed.with_name("fasttun")
    assert VERSION in run(command, "--version")
    assert "--listen" in run(installed, "-m", "fasttun", "--help")
    where = run(installed, "-c", "import fasttun._core; print(fasttun._core.__file__, fasttun.__version__)").split()
    assert where[0].startswith(str(installed.parents[1]))
    assert where[1] == VERSION


def test_installed_demo_starts(installed: Path) -> None:
    assert "demo" in run(installed.with_name("fasttun"), "demo", "--help")
    assert "--listen" in run(installed, "-m", "fasttun.demo.pure_python", "--help")


def test_missing_extra_is_named(installed: Path) -> None:
    """rich is an extra: the command works without it."""
    assert run(installed, "-c", "import importlib.util; print(importlib.util.find_spec('rich'))").strip() == "None"
    assert "--listen" in run(installed.with_name("fasttun"), "--help")


@pytest.mark.slow
def test_editable_install_follows_the_sources(source: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(source, tmp_path / "tree", symlinks=True, ignore=NOT_SOURCE)
    python = new_environment(tmp_path / "env")
    pip(python, "install", "-q", "setuptools>=77", "cython>=3.1")
    pip(python, "install", "-q", "--no-build-isolation", "--editable", tree)
    assert VERSION in run(python.with_name("fasttun"), "--version")
    version = tree / "fasttun" / "_version.py"
    version.write_text(version.read_text().replace(VERSION, "7.7.7"))
    assert "7.7.7" in run(python.with_name("fasttun"), "--version")
    assert list((tree / "fasttun").glob("_core.*.so"))
    assert not list((tree / "fasttun").glob("*.c")), "generated C belongs below build/"


@pytest.mark.parametrize("compiler", ["/bin/false", "/no/such/compiler"])
def test_failing_compiler_fails_the_install_and_says_why(sdist: Path, tmp_path: Path, compiler: str) -> None:
    python = new_environment(tmp_path / "env")
    pip(python, "install", "-q", "setuptools>=77", "cython>=3.1")
    install = ("install", "--no-build-isolation", "--no-deps", sdist)
    said = pip(python, *install, expect=1, CC=compiler, LDSHARED=compiler)
    assert "fasttun's C extension did not build" in said
    assert "apt-get install gcc libc6-dev python3-dev" in said
    assert compiler in said.partition("The compiler said:")[2]
    assert "Traceback" not in said.partition("fasttun's C extension")[2].partition("The compiler said:")[0]
    run(python, "-c", "import fasttun", expect=1)


@pytest.mark.slow
@pytest.mark.parametrize("version", sorted(OTHER_PYTHONS, key=lambda version: int(version[2:])))
def test_other_pythons_build_and_import(sdist: Path, tmp_path: Path, version: str) -> None:
    """Build isolation included: this is `pip install fasttun` as a user of that version sees it."""
    python = new_environment(tmp_path / "env", OTHER_PYTHONS[version])
    pip(python, "install", "-q", sdist)
    assert VERSION in run(python.with_name("fasttun"), "--version")
    code = "import fasttun, fasttun._core, sys; print(*sys.version_info[:2], sep='.')"
    assert run(python, "-W", "error", "-c", code).strip() == version
