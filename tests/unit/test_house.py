"""House rules that a reader cannot see at a glance: what the loop compiles to, who imports whom, what is in git.

Not for style that ruff, mypy or cython-lint find; those run in `make lint`.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fasttun"
SOURCES = sorted(
    path.relative_to(ROOT).as_posix() for suffix in ("py", "pyx", "pxd") for path in PACKAGE.rglob(f"*.{suffix}")
)
CYTHON = [name for name in SOURCES if name.endswith((".pyx", ".pxd"))]

# What Cython writes where a function may raise, takes the GIL, or touches a Python object.
NEEDS_GIL = re.compile(
    r"PyErr_Occurred|ErrOccurredWithGIL|PyGILState|AddTraceback|WriteUnraisable|RaiseUnboundLocal|"
    r"Py_(X?INCREF|X?DECREF|BLOCK_THREADS|UNBLOCK_THREADS)|__Pyx_X?(GOTREF|GIVEREF)|RefNanny|PyObject"
)
# A module-level C function in Cython: `cdef [inline] type name(arguments) [noexcept] [nogil]:`, on one line or several.
CDEF_FUNCTION = re.compile(
    r"^cdef (?!extern|class|enum|struct|union|packed)[^\n=:(]*?\b(\w+)\(([^:]*?)\)([^:()\n]*):", re.M
)
C_FUNCTION = re.compile(r"^[\w \t*]*?\b(__pyx_\w+)\([^;{}]*\) \{\n(.*?)^\}", re.M | re.S)


def generate_c(directory: Path, target: Path) -> dict[str, str]:
    """The C that the real build makes of the extensions in `directory`, by extension, without comments.

    `true` for a compiler: Cython runs with setup.py's directives and nothing is compiled.
    """
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", target, "--build-lib", target / "lib"],
        cwd=directory, env={**os.environ, "CC": "true", "LDSHARED": "true"}, check=True, capture_output=True,
    )
    return {
        path.stem: re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.S)
        for path in (target / "fasttun").glob("*.c")
    }


def functions(text: str) -> dict[str, str]:
    """The bodies of the C functions that Cython named, by name. A name's last part is the Cython function's."""
    return dict(C_FUNCTION.findall(text))


def bare_names(text: str) -> set[str]:
    """The names of the module-level C functions that the Cython source `text` defines."""
    return {match[1] for match in CDEF_FUNCTION.finditer(text)}


def body_of(name: str, bodies: dict[str, str]) -> str | None:
    found = [body for key, body in bodies.items() if re.fullmatch(rf"__pyx_f_(\d+\w+?_)?{name}", key)]
    return found[0] if found else None


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return generate_c(ROOT, tmp_path_factory.mktemp("generated"))


@pytest.mark.parametrize("name", CYTHON)
def test_c_functions_are_noexcept_nogil(name: str) -> None:
    text = (ROOT / name).read_text()
    loose = [match[1] for match in CDEF_FUNCTION.finditer(text) if match[3].split() != ["noexcept", "nogil"]]
    assert not loose, f"{name}: without `noexcept nogil`, each call is followed by an exception check: {loose}"


def test_the_loop_has_no_hidden_exception_checks(generated: dict[str, str]) -> None:
    names = {name: bare_names((ROOT / name).read_text()) for name in CYTHON}
    seen = set()
    for text in generated.values():
        bodies = functions(text)
        for source, bare in names.items():
            for function in bare:
                body = body_of(function, bodies)
                if body is None:
                    continue
                seen.add(function)
                found = NEEDS_GIL.search(body)
                assert found is None, f"{source}: {function} compiles to {found and found[0]}"
    lost = set().union(*names.values()) - seen
    assert names["fasttun/_core.pyx"] <= seen, "functions of the loop that were not found in the C"
    assert len(lost) <= len(seen) / 10, f"too few functions found in the C, the search is wrong: {lost}"


def test_run_leaves_the_gil_once_and_calls_only_the_loop(generated: dict[str, str]) -> None:
    """`Engine.run` must hold nothing between giving up the GIL and taking it back but the loop's call."""
    bodies = [body for name, body in functions(generated["_core"]).items() if re.search(r"6Engine_\d+run$", name)]
    regions = [
        region for body in bodies for region in re.findall(r"Py_UNBLOCK_THREADS(.*?)Py_BLOCK_THREADS", body, re.S)
    ]
    assert len(regions) == 1, "one long `with nogil`"
    assert NEEDS_GIL.search(regions[0]) is None
    assert re.findall(r"__pyx_f_\w+?(?=\()", regions[0]) == ["__pyx_f_7fasttun_5_core_serve"]


def test_the_search_for_exception_checks_finds_one(tmp_path: Path) -> None:
    """The same search on a function that does have the check, since a search that finds nothing proves nothing."""
    (tmp_path / "fasttun").mkdir()
    (tmp_path / "fasttun" / "__init__.py").touch()
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "README.md").touch()
    (tmp_path / "fasttun" / "_version.py").write_text('__version__ = "0"\n')
    (tmp_path / "fasttun" / "_core.pyx").write_text(
        "cdef int may_raise(int x) nogil:\n    return -x\n"
        "cdef int sound(int x) noexcept nogil:\n    return x + 1\n"
        "cdef int checks(int x) noexcept nogil:\n    return may_raise(x) + sound(x)\n"
        "def call(int x):\n    with nogil:\n        x = checks(x)\n    return x\n"
    )
    bodies = functions(generate_c(tmp_path, tmp_path / "generated")["_core"])
    sound, checks = body_of("sound", bodies), body_of("checks", bodies)
    assert sound is not None
    assert checks is not None
    assert NEEDS_GIL.search(sound) is None
    assert NEEDS_GIL.search(checks) is not None


@pytest.mark.parametrize("name", [name for name in CYTHON if "/_native/" in name])
def test_headers_reach_no_python(name: str) -> None:
    """The header modules cimport by absolute path, never from the engine, and import no Python module."""
    for line in (ROOT / name).read_text().splitlines():
        words = line.split()
        if words[:1] == ["import"] or (words[:1] == ["from"] and "import" in words):
            pytest.fail(f"imports Python: {line}")
        if words[:1] in (["from"], ["cimport"]):
            assert not words[1].startswith((".", "fasttun._core", "fasttun._testing")), line


@pytest.mark.parametrize("name", SOURCES)
def test_files_say_what_they_are_for(name: str) -> None:
    text = (ROOT / name).read_text()
    text = re.sub(r"^#!.*\n", "", text)
    assert not text.strip() or text.startswith(('"""', "# ")), "starts with neither a docstring nor a comment"


@pytest.mark.parametrize(
    "name", [name for name in SOURCES if name.endswith(".py") and not name.startswith("fasttun/cli/")]
)
def test_only_the_entry_point_imports_the_command_line(name: str) -> None:
    if name == "fasttun/__main__.py":
        return
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ["fasttun", *name.split("/")[1:-1]]
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            modules = [base + (node.module or ""), *(f"{base}{node.module or ''}.{n.name}" for n in node.names)]
        for module in modules:
            assert not (module + ".").replace("..", ".").startswith("fasttun.cli."), f"line {node.lineno}"


def test_import_is_light() -> None:
    """`import fasttun` must not pay for what only the command line or a real device needs."""
    code = "import sys; before = set(sys.modules); import fasttun; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "fasttun" in loaded
    heavy = {"click", "rich", "pyroute2", "asyncio", "multiprocessing", "subprocess", "ssl", "http", "scapy"}
    assert not loaded & heavy
    assert not [name for name in done.stdout.split() if name.startswith(("fasttun.cli", "fasttun.demo"))]


def test_nothing_generated_is_in_git() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split("\0")
    files = [name for name in listed if name and (ROOT / name).is_file()]
    generated = [
        name
        for name in files
        if name.endswith((".so", ".o", ".pyc", ".whl"))
        or (name.endswith((".c", ".cpp", ".html")) and b"Generated by Cython" in (ROOT / name).read_bytes()[:400])
    ]
    assert not generated


def test_every_extension_has_a_stub() -> None:
    assert [name for name in SOURCES if name.endswith(".pyx") and not (ROOT / name).with_suffix(".pyi").is_file()] == []
