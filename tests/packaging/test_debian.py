"""The Debian package, built by its recipe and installed by dpkg; the units in it under a systemd that runs.

And the container image's recipe, by its shape: the image itself is not built, that needs a registry.
dpkg installs for real in a chroot whose changes go to memory (overlayfs): the machine beneath stays as it is.
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
from support.booted import SYSTEMD, Booted
from support.netns import missing, wait_until

from fasttun.wireguard.keys import PrivateKey

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
    for link in (path for path in (ROOT / "fasttun").rglob("*") if path.is_symlink()):
        assert str(link.resolve().relative_to(ROOT)) in kept, f"{link} would lead nowhere in the image"


def test_the_images_extras_are_extras_there_are() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for file in ("Dockerfile", "debian/rules"):
        (extras,) = re.findall(r"'\.\[(.*?)\]'", (ROOT / "packaging" / file).read_text())
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", project, re.M), f"{file}: {extra}"


def test_the_packages_version_is_the_programs() -> None:
    first = (ROOT / "packaging" / "debian" / "changelog").read_text().splitlines()[0]
    assert first.startswith(f"fasttun ({VERSION}-1) ")


# ---------------------------------------------------------------------------------------------- under a real systemd

UNIT = "fasttun@tun0.service"


@pytest.fixture(scope="module")
def booted(package: Path) -> Iterator[Booted]:
    """A system that systemd has booted, with the package installed and a client `peer` at 10.99.0.2."""
    if missing() or not os.path.exists(SYSTEMD):
        pytest.skip(missing() or f"needs {SYSTEMD} (apt install systemd)")
    with Booted() as system:
        system.path("/tmp/fasttun.deb").write_bytes(package.read_bytes())
        system.run("dpkg", "--install", "/tmp/fasttun.deb")
        system.run("bash", "-ec", """
            ip netns add peer; ip link add v0 type veth peer name v1 netns peer
            ip addr add 10.99.0.1/24 dev v0; ip link set v0 up
            ip -n peer addr add 10.99.0.2/24 dev v1; ip -n peer link set v1 up""")
        yield system


def answers(system: Booted) -> bool:
    return "1 received" in system.run("ip", "netns", "exec", "peer", "ping", "-c1", "-W1", "10.7.0.1", check=False)


@pytest.mark.slow
@pytest.mark.netns
def test_the_service_lives_under_systemd(booted: Booted) -> None:
    """Installed, ready, shut in, reloaded, killed, hung and stopped; the tunnel carries packets all the while."""
    told = booted.run("fasttun", "service", "install", "tun0", "--now", "--", "--listen", "--address", "10.7.0.1/24")
    assert "ran systemctl enable --now fasttun@tun0.service" in told
    assert booted.show(UNIT, "ActiveState") == "active", "systemctl start waits for READY=1"
    assert booted.show(UNIT, "StatusText").startswith("tun0 (10.7.0.1/24, MTU ")
    assert booted.show(UNIT, "WatchdogUSec") == "30s"
    booted.run("systemd-run", "--quiet", "--unit=peer", "-p", "NetworkNamespacePath=/run/netns/peer",
               "-p", "Environment=FASTTUN_RUNTIME_DIR=/run/peer",
               "fasttun", "--server", "10.99.0.1", "--address", "10.7.0.2/24")
    wait_until(lambda: answers(booted), 10)

    first = booted.show(UNIT, "MainPID")
    shut = booted.run("nsenter", f"--target={first}", "--mount", "sh", "-c",
                      "touch /usr/x /etc/x; ls -A /root /tmp; echo 1 > /proc/sys/net/ipv4/ip_forward", check=False)
    assert shut.count("Read-only file system") == 3
    assert len(shut.split("/root:")[1].split("sh:")[0].split()) == 1, f"homes and /tmp look empty: {shut}"
    status = booted.run("cat", f"/proc/{first}/status")
    held = dict(re.findall(r"^(CapBnd|CapEff|NoNewPrivs|Seccomp):\s+(\S+)", status, re.M))
    assert held == {"CapBnd": "0000000000001400", "CapEff": "0000000000001400", "NoNewPrivs": "1", "Seccomp": "2"}

    booted.run("systemctl", "reload", UNIT)
    assert (booted.show(UNIT, "ActiveState"), booted.show(UNIT, "MainPID")) == ("active", first)
    assert answers(booted)

    booted.run("kill", "-KILL", first)
    wait_until(lambda: booted.show(UNIT, "NRestarts") == "1" and booted.show(UNIT, "ActiveState") == "active", 10)
    wait_until(lambda: answers(booted), 10)

    booted.run("mkdir", "-p", f"/run/systemd/system/{UNIT}.d")
    booted.path(f"/run/systemd/system/{UNIT}.d/hasty.conf").write_text("[Service]\nWatchdogSec=1\nRestartSec=0\n")
    booted.run("systemctl", "daemon-reload")
    booted.run("systemctl", "restart", UNIT)
    second = booted.show(UNIT, "MainPID")
    time.sleep(1.5)
    assert booted.show(UNIT, "MainPID") == second, "it tells the watchdog in time"
    booted.run("kill", "-STOP", second)
    wait_until(lambda: booted.show(UNIT, "MainPID") not in ("0", second), 15, what="the watchdog's restart")
    wait_until(lambda: answers(booted), 10)

    assert "removed /etc/fasttun/tun0.conf" in booted.run("fasttun", "service", "remove", "tun0", "--now")
    assert booted.show(UNIT, "ActiveState") == "inactive"
    assert "does not exist" in booted.run("ip", "link", "show", "tun0", check=False)


@pytest.mark.slow
@pytest.mark.netns
def test_the_fast_path_works_within_the_sandbox(booted: Booted) -> None:
    booted.run("fasttun", "service", "install", "tun2", "--now", "--", "--fast-path", "--listen", "--port", "1235",
               "--address", "10.8.0.1/24")
    assert "fast-path on" in " ".join(booted.run("fasttun", "status", "tun2").split())
    booted.run("fasttun", "service", "remove", "tun2", "--now")


@pytest.mark.slow
@pytest.mark.netns
def test_a_wg_quick_file_lives_under_systemd(booted: Booted) -> None:
    """A default route, firewall, hook and SaveConfig from within the unit; a peer that comes with `reload`."""
    keys = [PrivateKey.generate() for _ in range(3)]
    booted.run("mkdir", "-p", "/etc/wireguard", "/run/guest")
    file = booted.path("/etc/wireguard/wg0.conf")
    file.write_text(f"""[Interface]
PrivateKey = {keys[0].to_base64()}
Address = 10.8.0.2/24
PostUp = echo %i is up > /etc/wireguard/told
SaveConfig = true
[Peer]
PublicKey = {keys[1].public}
AllowedIPs = 0.0.0.0/0
Endpoint = 10.99.0.2:51820
""")
    file.chmod(0o600)
    booted.path("/run/guest/wgp.conf").write_text(f"""[Interface]
PrivateKey = {keys[1].to_base64()}
Address = 10.8.0.1/24
ListenPort = 51820
[Peer]
PublicKey = {keys[0].public}
AllowedIPs = 10.8.0.2/32
""")
    booted.run("chmod", "600", "/run/guest/wgp.conf")
    booted.run("systemd-run", "--quiet", "--unit=guest", "-p", "NetworkNamespacePath=/run/netns/peer",
               "fasttun", "up", "-f", "/run/guest/wgp.conf")
    unit = "fasttun-up@wg0.service"
    booted.run("fasttun", "service", "install", "wg0", "--now")
    assert booted.show(unit, "StatusText") == "wg0 is up"
    wait_until(lambda: "1 received" in booted.run("ping", "-c1", "-W1", "10.8.0.1", check=False), 10)
    assert booted.path("/etc/wireguard/told").read_text() == "wg0 is up\n"
    assert "not from all fwmark" in booted.run("ip", "rule")
    session = booted.run("wg", "show", "wg0", "latest-handshakes")
    with file.open("a") as more:
        more.write(f"[Peer]\nPublicKey = {keys[2].public}\nAllowedIPs = 10.9.0.0/16\n")
    booted.run("systemctl", "reload", unit)
    wait_until(lambda: str(keys[2].public) in booted.run("wg", "show", "wg0", "peers"))
    assert session in booted.run("wg", "show", "wg0", "latest-handshakes")
    booted.run("systemctl", "stop", unit)
    assert booted.show(unit, "Result") == "success"
    assert "fwmark" not in booted.run("ip", "rule")
    assert str(keys[2].public) in file.read_text()
