"""`fasttun service install|remove NAME`: the systemd units, and what one tunnel's instance is told.

A name with flags is an instance of fasttun@.service, its flags in /etc/fasttun/NAME.conf; a name alone is one of
fasttun-up@.service, which brings up /etc/wireguard/NAME.conf. contrib/ has the same units.
Not for: what the process says to the service manager (`fasttun.notify`).
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from ..config import MAX_NAME, TunnelConfig
from ..errors import ConfigurationError, FasttunError, StateError

__all__ = ["UNITS", "service"]

_COMMAND = "/usr/bin/fasttun"
"""Where packages put the program; `install` writes where it is."""
_VARIABLE = "FASTTUN_FLAGS"
_HIDDEN = {"fasttun": ("/home", "/root", "/run/user", "/tmp", "/var/tmp"), "fasttun-up": ("/tmp", "/var/tmp")}
"""What each unit's process does not see (ProtectHome, PrivateTmp)."""
_NOT_HERE = {"user": "the unit gives it the rights of none but the network", "explain": "it would do nothing"}

UNITS = {
    "fasttun@.service": f"""\
# One plain or --key tunnel, %i its device; flags in /etc/fasttun/%i.conf: {_VARIABLE}="--listen --address 10.7.0.1/24".
# Its secrets and files belong in /etc/fasttun: homes and /tmp are out of its sight.

[Unit]
Description=fasttun tunnel %i
Documentation=man:fasttun(1)
Wants=network-online.target
After=network-online.target nss-lookup.target

[Service]
Type=notify
NotifyAccess=main
EnvironmentFile=/etc/fasttun/%i.conf
ExecStart={_COMMAND} --device %i ${_VARIABLE}
ExecReload=/bin/kill -HUP $MAINPID
Restart=on-failure
RestartSec=2
# Flags or a name that are wrong stay so.
RestartPreventExitStatus=2
WatchdogSec=30
TimeoutStopSec=20
RuntimeDirectory=fasttun
RuntimeDirectoryMode=0700
# Shared with the other instances: it stays when one ends.
RuntimeDirectoryPreserve=yes

CapabilityBoundingSet=CAP_NET_ADMIN CAP_NET_BIND_SERVICE
NoNewPrivileges=yes
DevicePolicy=closed
DeviceAllow=/dev/net/tun rw
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
ProtectProc=invisible
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
KeyringMode=private
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM
UMask=0077

[Install]
WantedBy=multi-user.target
""",
    "fasttun-up@.service": f"""\
# One WireGuard tunnel from /etc/wireguard/%i.conf. Hooks in that file are programs of root's, and the resolver's
# files are written, so that less is shut here than in fasttun@.service.

[Unit]
Description=fasttun WireGuard tunnel %i
Documentation=man:fasttun(1)
Wants=network-online.target
After=network-online.target nss-lookup.target

[Service]
Type=notify
NotifyAccess=main
ExecStart={_COMMAND} up --foreground %i
ExecReload=/bin/kill -HUP $MAINPID
Restart=on-failure
RestartSec=2
# Flags or a name that are wrong stay so.
RestartPreventExitStatus=2
WatchdogSec=30
TimeoutStopSec=30
RuntimeDirectory=fasttun wireguard
RuntimeDirectoryMode=0700
RuntimeDirectoryPreserve=yes

CapabilityBoundingSet=CAP_NET_ADMIN CAP_NET_RAW CAP_NET_BIND_SERVICE
NoNewPrivileges=yes
DevicePolicy=closed
DeviceAllow=/dev/net/tun rw
ProtectHome=read-only
PrivateTmp=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
KeyringMode=private
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
UMask=0077

[Install]
WantedBy=multi-user.target
""",
}
_root = click.option("--root", metavar="DIR", default="/", help="Of another system, such as an image (/).")
_now = click.option("--now", is_flag=True, help="Run the systemctl commands, too; else they are printed.")

_FAST_PATH = """\
# --fast-path loads programs into the kernel.
[Service]
CapabilityBoundingSet=CAP_BPF CAP_PERFMON
SystemCallFilter=bpf
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def service() -> None:
    """Tunnels as systemd services: started at boot, watched, sandboxed."""


@service.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[-- FLAGS...]")
@_root
@_now
def install(name: str, flags: Sequence[str], root: str, now: bool) -> None:
    """Make the tunnel NAME a service.

    With FLAGS, those of `fasttun` itself, after --: they are checked and kept in /etc/fasttun/NAME.conf; NAME is
    the device. Without any: the wg-quick file /etc/wireguard/NAME.conf.
    """
    place, unit = _Place(root), _unit(_sound(name), flags)
    place.may_run(now)
    if place.is_here:
        _check_is_seen("service", unit, _program().split()[0], sys.executable, sys.base_prefix, __file__)
    if flags:
        _check(name, flags)
        place.write(_settings(name), f"{_VARIABLE}={_quoted(flags)}\n", 0o600)
        if "--fast-path" in flags:
            place.write(_drop_in(name), _FAST_PATH, 0o644)
        else:
            place.remove(_drop_in(name))
    elif not place.has(f"etc/wireguard/{name}.conf"):
        raise ConfigurationError("service", f"there are no flags, and no /etc/wireguard/{name}.conf",
                                 f"as in fasttun service install {name} -- --listen --address 10.7.0.1/24")
    template = f"{unit}@.service"
    if place.program_is_packaged(template):
        place.remove(f"etc/systemd/system/{template}")
    else:
        place.write(f"etc/systemd/system/{template}", UNITS[template].replace(_COMMAND, _program()), 0o644)
    place.tell([["systemctl", "daemon-reload"], ["systemctl", "enable", "--now", f"{unit}@{name}.service"]], now)


@service.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name")
@_root
@_now
def remove(name: str, root: str, now: bool) -> None:
    """Take the service of the tunnel NAME away: its instance, its flags, and the unit that no other one needs.

    A wg-quick file stays.
    """
    place = _Place(root)
    place.may_run(now)
    flagged = place.has(_settings(_sound(name)))
    if not flagged and not place.has("etc/systemd/system/fasttun-up@.service"):
        raise StateError(f"{name} is no service that fasttun installed")
    unit = _unit(name, ["flags"] if flagged else [])
    place.tell([["systemctl", "disable", "--now", f"{unit}@{name}.service"]], now)
    if flagged:
        place.remove(_settings(name))
        place.remove(_drop_in(name))
    if not place.instances(unit, besides=name):
        place.remove(f"etc/systemd/system/{unit}@.service")
    place.tell([["systemctl", "daemon-reload"]], now)


def _unit(name: str, flags: Sequence[str]) -> str:
    return "fasttun" if flags else "fasttun-up"


def _settings(name: str) -> str:
    return f"etc/fasttun/{name}.conf"


def _drop_in(name: str) -> str:
    return f"etc/systemd/system/fasttun@{name}.service.d/fast-path.conf"


def _sound(name: str) -> str:
    """A name that is an interface's and needs no escaping as an instance (systemd.unit(5))."""
    allowed = name.replace("_", "").replace(".", "").replace("-", "")
    if not (allowed.isascii() and allowed.isalnum() and len(name) <= MAX_NAME and name not in (".", "..")
            and not name.startswith("-")):
        raise ConfigurationError("service", f"{name!r} is no name for a device and its service",
                                 f"up to {MAX_NAME} letters, digits, and _ . -, such as tun0")
    return name


def _check(name: str, flags: Sequence[str]) -> None:
    """Refuses at once what would fail at every start."""
    from .command import _fields, fasttun, go_style

    words = ["--device", name, *go_style(list(flags))]
    context = fasttun.make_context("fasttun", words)
    given = dict(context.params)
    held = vars(context)  # click 8.2 has renamed the group's own
    words = [*held.get("_protected_args", held.get("protected_args", ())), *context.args]
    if words:
        raise click.UsageError(f"{words[0]}: a service is told flags alone")
    for flag, reason in _NOT_HERE.items():
        if given.get(flag):
            raise ConfigurationError(flag, "is not for a service", reason)
    if given.get("key"):
        _check_is_seen("key", "fasttun", os.path.abspath(given["key"]))
    for flag in ("user", "explain", "log_format", "verbose", "quiet", "key", "peer", "metrics"):
        given.pop(flag, None)
    TunnelConfig(**_fields(given))


def _check_is_seen(field: str, unit: str, *paths: str) -> None:
    """Refuses a file that the unit hides from its process, also behind links on the way to it."""
    for path in paths:
        real = os.path.realpath(path)
        for directory in _HIDDEN[unit]:
            if real.startswith(f"{directory}/"):
                hint = "put it into /etc/fasttun" if field == "key" else \
                    "install fasttun where a service sees it: python3 -m venv /opt/fasttun, or the package"
                raise ConfigurationError(field, f"{real} is out of the service's sight, as all in {directory} is", hint)


def _quoted(flags: Sequence[str]) -> str:
    r"""One assignment of systemd.exec(5)'s EnvironmentFile=, whose value is split again at blanks as a command line.

    Within double quotes a backslash stands before each ", \, ` and $.
    """
    inner = " ".join(flag if flag and not set(flag) & set(" \t'\"\\;") else _word(flag) for flag in flags)
    for sign in ('\\', '"', "`", "$"):
        inner = inner.replace(sign, f"\\{sign}")
    return f'"{inner}"'


def _word(flag: str) -> str:
    if "\n" in flag:
        raise ConfigurationError("service", f"{flag!r} has a line feed", "leave it out")
    return "'" + flag.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _program() -> str:
    """How systemd starts this very fasttun."""
    found = Path(sys.argv[0])
    if found.name == "fasttun" and found.is_absolute() and os.access(found, os.X_OK):
        return str(found)
    beside = Path(sys.executable).with_name("fasttun")
    if os.access(beside, os.X_OK):
        return str(beside)
    return f"{sys.executable} -m fasttun"


class _Place:
    """The file system that is changed; paths are below `root`, without the first slash."""

    def __init__(self, root: str) -> None:
        self._root = Path(root)
        self.is_here = self._root.resolve() == Path("/")
        if not self._root.is_dir():
            raise ConfigurationError("root", f"{root} is no directory", "name the other system's /")

    def may_run(self, now: bool) -> None:
        if now and not self.is_here:
            raise ConfigurationError("now", "is of no use with --root", "leave one of them out")

    def has(self, path: str) -> bool:
        return (self._root / path).is_file()

    def program_is_packaged(self, template: str) -> bool:
        """Whether a package has brought this unit and the program that it starts."""
        return self.has(f"usr/lib/systemd/system/{template}") and (not self.is_here or _program() == _COMMAND)

    def write(self, path: str, text: str, mode: int) -> None:
        """The whole file or the one before: FasttunError or OSError then."""
        target = self._root / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        except PermissionError as error:
            command = " ".join(map(shlex.quote, sys.argv[1:]))
            raise FasttunError(f"{error.filename}: {error.strerror}; this needs root: sudo fasttun {command}") from None
        try:
            with open(descriptor, "w") as file:
                os.fchmod(file.fileno(), mode)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        click.echo(f"wrote {target}")

    def remove(self, path: str) -> None:
        target = self._root / path
        with contextlib.suppress(FileNotFoundError):
            target.unlink()
            click.echo(f"removed {target}")
            if target.parent.name.endswith(".service.d") and not any(target.parent.iterdir()):
                target.parent.rmdir()

    def instances(self, unit: str, besides: str) -> list[str]:
        """Names of other tunnels that the unit serves."""
        if unit == "fasttun":
            names = {path.stem for path in (self._root / "etc/fasttun").glob("*.conf")}
        else:
            wanted = (self._root / "etc/systemd/system").glob(f"*.wants/{unit}@*.service")
            names = {path.name.removeprefix(f"{unit}@").removesuffix(".service") for path in wanted}
        return sorted(names - {besides})

    def tell(self, commands: list[list[str]], now: bool) -> None:
        """Print the commands, or run them; FasttunError with what one said."""
        for words in commands:
            if not now:
                root = [] if self.is_here else [f"--root={self._root}"]
                if root and words[1] == "daemon-reload":
                    continue
                left = [word for word in words[1:] if self.is_here or word != "--now"]
                click.echo("to do: " + " ".join(["systemctl", *root, *left]))
                continue
            if shutil.which(words[0]) is None:
                raise FasttunError("systemctl: there is no such program: this system is not run by systemd")
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                raise FasttunError(f"{' '.join(words)}: {done.stderr.strip() or f'status {done.returncode}'}")
            click.echo(f"ran {' '.join(words)}")


def _write_units(directory: Path) -> None:
    for name, text in UNITS.items():
        (directory / name).write_text(text)


if __name__ == "__main__":  # python -m fasttun.cli.service DIRECTORY: for contrib/ and packages
    _write_units(Path(sys.argv[1]))
