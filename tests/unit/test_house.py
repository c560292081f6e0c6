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
    r"PyErr_|PyEval_|ErrOccurredWithGIL|PyGILState|AddTraceback|WriteUnraisable|RaiseUnboundLocal|"
    r"Py_(X?INCREF|X?DECREF|BLOCK_THREADS|UNBLOCK_THREADS)|__Pyx_X?(GOTREF|GIVEREF)|RefNanny|PyObject"
)
# A module-level C function in Cython: `cdef [inline] type name(arguments) [noexcept] [nogil]:`, on one line or several.
CDEF_FUNCTION = re.compile(
    r"^cdef (?!extern|class|enum|struct|union|packed)[^\n=:(]*?\b(\w+)\(([^:]*?)\)([^:()\n]*):", re.M
)
# A definition in the C that Cython wrote: its body ends at the first brace in column 0.
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


def reached(start: str, bodies: dict[str, str]) -> dict[str, str]:
    """The C functions of Cython's that `start` reaches through calls or pointers, itself too: name and body."""
    found: dict[str, str] = {}
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = bodies[name]
            waiting += [called for called in re.findall(r"\b__pyx_f_\w+", bodies[name]) if called in bodies]
    return found


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return generate_c(ROOT, tmp_path_factory.mktemp("generated"))


@pytest.mark.parametrize("name", CYTHON)
def test_nogil_functions_are_noexcept(name: str) -> None:
    """In `_native` all of them, in the extensions those that say `nogil`; the rest of those belongs to Python."""
    text = (ROOT / name).read_text()
    declared = [(match[1], match[3].split()) for match in CDEF_FUNCTION.finditer(text)]
    if "/_native/" not in name:
        declared = [(function, words) for function, words in declared if "nogil" in words]
    loose = [function for function, words in declared if words != ["noexcept", "nogil"]]
    assert not loose, f"without `noexcept nogil`, each call is followed by an exception check: {loose}"


def test_the_loop_has_no_hidden_exception_checks(generated: dict[str, str]) -> None:
    loop = reached("__pyx_f_7fasttun_5_core_serve", functions(generated["_core"]))
    for part in ("outbound_burst", "inbound_burst", "flush", "segment_frame", "coalescer_add", "admit", "now_ns"):
        assert any(name.endswith(f"_{part}") for name in loop), f"{part} not found: the search is wrong"
    for name, body in loop.items():
        found = NEEDS_GIL.search(body)
        assert found is None, f"{name} compiles to {found and found[0]}"


def test_run_gives_up_the_gil_once_and_calls_only_the_loop(generated: dict[str, str]) -> None:
    wrapped = [body for name, body in functions(generated["_core"]).items() if re.search(r"_pf_.*Engine_\d+run$", name)]
    (body,) = wrapped
    (region,) = re.findall(r"FastGIL_Remember\(\);(.*?)__Pyx_FastGIL_Forget\(\);", body, re.S)
    assert NEEDS_GIL.search(region) is None
    assert re.findall(r"\b(\w+)\(", region) == ["__pyx_f_7fasttun_5_core_serve"]


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
    unsound = reached("__pyx_f_7fasttun_5_core_checks", bodies)
    assert {name.rpartition("_")[2] for name in unsound} == {"checks", "raise", "sound"}
    assert NEEDS_GIL.search(unsound["__pyx_f_7fasttun_5_core_checks"]) is not None
    assert NEEDS_GIL.search(unsound["__pyx_f_7fasttun_5_core_sound"]) is None


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
