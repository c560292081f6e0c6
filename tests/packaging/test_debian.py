"""The Debian package, built by its recipe and installed by dpkg; the container image's recipe, by its shape.

dpkg installs for real in a chroot whose changes go to memory (overlayfs): the machine beneath stays as it is.
The image itself is not built: that needs a registry.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.netns import missing

ROOT = Path(__file__).resolve().parents[2]
VERSION = re.findall(r'^__version__ = "(.+)"', (ROOT / "fasttun" / "_version.py").read_text(), re.M)[0]
TOOLS = ("dpkg-buildpackage", "dpkg-deb", "dpkg-shlibdeps", "unshare", "chroot")


def run(*words: str | Path, expect: int = 0) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    clean["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    done = subprocess.run([str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=600, env=clean)
    assert done.returncode == expect, f"{words} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if lacking or not Path("/usr/bin/python3").exists():
        pytest.skip(f"no {', '.join(lacking) or '/usr/bin/python3'} here (apt install dpkg-dev python3)")
    base = tmp_path_factory.getbasetemp()
    target = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "deb"
    target.mkdir(exist_ok=True)
    with open(target / "lock", "w") as lock:  # one build for all of xdist's workers
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not list(target.glob("*.deb")):
            assert len(run(ROOT / "packaging" / "build-deb.sh", target).split()) == 1
    (built,) = target.glob("*.deb")
    return built


class Machine:
    """This machine's own file system with a layer above it, where dpkg may do what it likes."""

    def __init__(self, layer: Path) -> None:
        self._layer = layer
        for name in ("upper", "work", "merged"):
            (layer / name).mkdir()
        self._script = (
            f"mount -t overlay overlay -o lowerdir=/,upperdir={layer}/upper,workdir={layer}/work {layer}/merged && "
            f"mount --rbind /dev {layer}/merged/dev && mount -t proc proc {layer}/merged/proc && "
            f"mount --rbind /sys {layer}/merged/sys && mount -t tmpfs tmpfs {layer}/merged/run && "
            f'exec chroot {layer}/merged "$@"'
        )

    def run(self, *words: str, expect: int = 0) -> str:
        """In a mount and network namespace of its own."""
        return run("unshare", "-m", "-n", "sh", "-c", self._script, "sh", *words, expect=expect)

    def changed(self) -> set[str]:
        upper = self._layer / "upper"
        return {str(path.relative_to(upper)) for path in upper.rglob("*") if path.is_file() or path.is_symlink()}


@pytest.fixture
def machine(package: Path) -> Iterator[Machine]:
    """With the package installed, its dependencies checked against what is installed here."""
    if missing():
        pytest.skip(missing())
    # overlayfs takes no overlay as its upper layer
    layer = Path("/dev/shm") / f"fasttun-deb-{os.getpid()}-{time.monotonic_ns()}"
    layer.mkdir()
    try:
        machine = Machine(layer)
        (layer / "upper" / "fasttun.deb").write_bytes(package.read_bytes())
        machine.run("dpkg", "--install", "/fasttun.deb")
        yield machine
    finally:
        shutil.rmtree(layer)


@pytest.mark.slow
def test_the_package_is_whole(package: Path) -> None:
    assert package.name == f"fasttun_{VERSION}-1_{run('dpkg', '--print-architecture').strip()}.deb"
    fields = dict(re.findall(r"^ (\S+): (.*)", run("dpkg-deb", "--info", package), re.M))
    for need in ("python3 (>= 3.", "python3 (<< 3.", "libc6 (>=", "libssl3", "iproute2"):
        assert need in fields["Depends"]
    rows = [row.split(maxsplit=5) for row in run("dpkg-deb", "--contents", package).splitlines()]
    files = {row[5].removeprefix("./").partition(" -> ")[0]: row for row in rows}
    for path in ("usr/bin/fasttun", "usr/bin/fasttun-wg", "usr/share/man/man1/fasttun.1.gz",
                 "usr/lib/systemd/system/fasttun@.service", "usr/lib/systemd/system/fasttun-up@.service",
                 "usr/share/bash-completion/completions/fasttun", "usr/share/zsh/vendor-completions/_fasttun",
                 "usr/share/fish/vendor_completions.d/fasttun.fish", "usr/share/doc/fasttun/copyright",
                 "usr/lib/fasttun/fasttun/observe/page.html"):
        assert path in files, path
    assert files["etc/fasttun/"][0] == "drwx------"
    assert {row[1] for row in rows} == {"root/root"}
    assert all(path.startswith(("usr/", "etc/fasttun/")) or path in ("", "etc/") for path in files)
    assert not [path for path in files if re.search(r"/fasttun/fasttun/.*\.(c|o)$", path)]


@pytest.mark.slow
@pytest.mark.netns
def test_the_installed_program_works(machine: Machine) -> None:
    assert machine.run("fasttun", "--version") == f"fasttun {VERSION}\n"
    assert "NAME" in machine.run("fasttun-wg", "--help")
    code = "import sys; sys.path.insert(0, '/usr/lib/fasttun'); import fasttun._core as core; print(core.__file__)"
    assert machine.run("python3", "-I", "-c", code).startswith("/usr/lib/fasttun/fasttun/_core")
    found = json.loads(machine.run("fasttun", "doctor", "--json"))
    assert {f["name"]: f["status"] for f in found["findings"]}["tun"] == "ok"
    assert "PublicKey" not in machine.run("fasttun", "genkey")


@pytest.mark.slow
@pytest.mark.netns
def test_the_installed_listener_answers_a_client(machine: Machine) -> None:
    """Both in one network namespace, over loopback: a tunnel is set up, met, and undone."""
    script = """
        ip link set lo up
        fasttun --listen --device ft0 --address 10.77.0.1/24 & listener=$!
        for i in $(seq 50); do fasttun doctor --server 127.0.0.1 --json | grep -q '"reachable", "status": "ok"' && break
        sleep 0.1; done
        fasttun status --json; ip -br address show ft0; kill $listener; wait $listener; echo "status $?"
        ip -br link show ft0 2>&1 || echo gone"""
    told = machine.run("bash", "-c", script)
    assert "10.77.0.1/24" in told
    assert '"mode": "plain"' in told
    assert "status 0" in told
    assert told.rstrip().endswith("gone")


@pytest.mark.slow
@pytest.mark.netns
def test_the_installed_page_and_completion_are_found(machine: Machine) -> None:
    script = """
        command -v man >/dev/null && man -w fasttun
        . /usr/share/bash-completion/completions/fasttun
        COMP_WORDS=(fasttun sta); COMP_CWORD=1; _fasttun_completion fasttun
        echo "${COMPREPLY[@]}"
    """
    told = machine.run("bash", "-c", script)
    if shutil.which("man"):
        assert "/usr/share/man/man1/fasttun.1.gz" in told
    assert told.split()[-1] == "status"


@pytest.mark.slow
@pytest.mark.netns
def test_a_service_of_the_package_needs_no_unit_of_its_own(machine: Machine) -> None:
    told = machine.run("bash", "-c", "fasttun service install tun0 -- --listen --address 10.7.0.1/24; "
                       "ls /etc/systemd/system/fasttun@.service; fasttun service remove tun0; ls /etc/fasttun")
    assert "to do: systemctl enable --now fasttun@tun0.service" in told
    assert "No such file" in told
    assert "removed /etc/fasttun/tun0.conf" in told
    assert told.rstrip().endswith("to do: systemctl daemon-reload")


@pytest.mark.slow
@pytest.mark.netns
def test_purging_leaves_nothing(machine: Machine) -> None:
    machine.run("fasttun", "--version")
    machine.run("dpkg", "--purge", "fasttun")
    left = {path for path in machine.changed() if "fasttun" in path and path != "fasttun.deb"}
    assert left == set()


# ------------------------------------------------------------------------------------------------ the image's recipe


def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "packaging" / "Dockerfile").read_text()
    rows = re.sub(r"^#.*\n", "", text, flags=re.M).replace("\\\n", " ").splitlines()
    parts = [row.strip().partition(" ") for row in rows if row.strip()]
    return [(word.upper(), rest.strip()) for word, _, rest in parts]


def test_the_images_recipe_has_the_shape() -> None:
    known = {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    told = instructions()
    assert {word for word, _ in told} <= known
    stages = [rest for word, rest in told if word == "FROM"]
    assert len(stages) == 2
    assert stages[0].endswith(" AS build"), "the compiler stays out of the image"
    for word, rest in told:
        if word in ("ENTRYPOINT", "CMD"):
            assert all(isinstance(part, str) for part in json.loads(rest)), "a shell would not pass signals on"
        if word == "RUN":
            subprocess.run(["bash", "-n", "-c", rest], check=True)
        if word == "RUN" and "apt-get install" in rest:
            assert "rm -rf /var/lib/apt/lists" in rest
    last = [word for word, _ in told[max(at for at, (word, _) in enumerate(told) if word == "FROM"):]]
    assert {"COPY", "ENTRYPOINT", "STOPSIGNAL"} <= set(last)


def test_the_image_is_given_files_that_there_are() -> None:
    kept = {row[1:] for row in (ROOT / "packaging" / "Dockerfile.dockerignore").read_text().split() if row[0] == "!"}
    for word, rest in instructions():
        if word == "COPY" and not rest.startswith("--from"):
            for name in shlex.split(rest)[:-1]:
                assert (ROOT / name).exists(), name
                assert name.rstrip("/") in kept, f"{name} is left out by the ignore file"


def test_the_images_extras_are_extras_there_are() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for file in ("Dockerfile", "debian/rules"):
        (extras,) = re.findall(r"'\.\[(.*?)\]'", (ROOT / "packaging" / file).read_text())
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", project, re.M), f"{file}: {extra}"


def test_the_packages_version_is_the_programs() -> None:
    first = (ROOT / "packaging" / "debian" / "changelog").read_text().splitlines()[0]
    assert first.startswith(f"fasttun ({VERSION}-1) ")
