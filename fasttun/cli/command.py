"""`fasttun`: all flags of the tunnel, and the subcommands beside it.

A flag sets one field of `TunnelConfig`, which knows what is valid and gets values as the user wrote them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from .._version import __version__
from .group import LazyCommand, SectionedGroup, SectionOption
from .options import METRICS, METRICS_ATTRIBUTES

__all__ = ["fasttun", "go_style"]

COMMANDS = {
    "status": LazyCommand("fasttun.cli.status", "status", "The running tunnels."),
    "top": LazyCommand("fasttun.cli.top", "top", "A running tunnel, live."),
    "capture": LazyCommand("fasttun.cli.capture", "capture", "Packets of a running tunnel, printed or as pcapng."),
    "bench": LazyCommand("fasttun.cli.bench", "bench", "The throughput of a running tunnel, now."),
    "doctor": LazyCommand("fasttun.cli.doctor", "doctor", "What stands in the way here, and how to mend it."),
    "invite": LazyCommand("fasttun.cli.people", "invite", "Let somebody in: keys, address, file, QR code."),
    "revoke": LazyCommand("fasttun.cli.people", "revoke", "Shut a peer out."),
    "peers": LazyCommand("fasttun.cli.people", "peers", "The peers of a listener."),
    "genkey": LazyCommand("fasttun.cli.keys", "genkey", "A new private key."),
    "pubkey": LazyCommand("fasttun.cli.keys", "pubkey", "The public key of the private key on standard input."),
    "genpsk": LazyCommand("fasttun.cli.keys", "genpsk", "A new preshared key."),
    "up": LazyCommand("fasttun.cli.updown", "up", "Bring a WireGuard tunnel up from a wg-quick file."),
    "down": LazyCommand("fasttun.cli.updown", "down", "Take it down again."),
    "wg": LazyCommand("fasttun.cli.wg", "wg", "Make a WireGuard device that wg, wg-quick and ip set up."),
    "service": LazyCommand("fasttun.cli.service", "service", "Tunnels as systemd services."),
    "completion": LazyCommand("fasttun.cli.completion", "completion", "The completion script for a shell."),
    "demo": LazyCommand(
        "fasttun.cli.demo", "demo", "Two hosts on this machine, a tunnel between them, a file through it."
    ),
}
BUSY_POLL_US = "50"
"""Microseconds of --busy-poll without a value."""

_EXAMPLES = """\b
Examples:
  On a host that the other one can reach (open UDP port 1234 there):
    sudo fasttun --listen --address 10.7.0.1/24
  On the other one, behind NAT or not; then `ping 10.7.0.1`:
    sudo fasttun --server 198.51.100.7 --address 10.7.0.2/24
  A network behind the server, IPv6 inside, only known senders:
    sudo fasttun --server vpn.example.org --address 10.7.0.2/24 --route 192.168.5.0/24
    sudo fasttun --listen --address 10.7.0.1/24 --address fd07::1/64 --allow 203.0.113.0/24
  Encrypted, by the WireGuard protocol; each side has the other's public key:
    fasttun genkey > key && fasttun pubkey < key
    sudo fasttun --listen --address 10.7.0.1/24 --key key --peer CLIENTKEY,10.7.0.2
    sudo fasttun --server 198.51.100.7 --address 10.7.0.2/24 --key key --peer SERVERKEY
  What it would do, as ip commands; changes nothing, needs no root:
    fasttun --server 198.51.100.7 --address 10.7.0.2/24 --explain
  Without root, on a device that an administrator made for you:
    sudo ip tuntap add dev tun0 mode tun user $USER
    fasttun --server 198.51.100.7

\b
Signals: INT and TERM end it and undo everything, HUP looks the server up again,
USR1 prints the counters. Without --key nothing is encrypted: for labs and trusted links.
"""

_GO_FLAG = re.compile(r"-(listen|server|port|device)(=.*)?", re.DOTALL)
_F = TypeVar("_F", bound=Callable[..., Any])


def go_style(words: Sequence[str]) -> list[str]:
    """lametun's own flags as Go's flag package takes them, one dash and `=` or a space, with two dashes."""
    end = words.index("--") if "--" in words else len(words)
    return [f"-{word}" if _GO_FLAG.fullmatch(word) else word for word in words[:end]] + list(words[end:])


def _option(section: str, *names: str, **attrs: Any) -> Callable[[_F], _F]:
    return click.option(*names, cls=SectionOption, section=section, **attrs)


_ROLE, _NETWORK, _WIRE, _SECRECY = "Which side", "Private network", "Between the hosts", "Encryption"
_PROCESS, _SPEED, _OTHER = "Process and log", "Speed (for measuring; the defaults are the fastest)", "Other"


@click.group(
    cls=SectionedGroup,
    lazy=COMMANDS,
    invoke_without_command=True,
    options_metavar="--listen | --server HOST  [FLAGS]",
    subcommand_metavar="| COMMAND",
    epilog=_EXAMPLES,
    add_help_option=False,
    context_settings={"max_content_width": 100, "show_default": False},
)
@_option(_ROLE, "--listen", is_flag=True, help="Wait for the other side; one listener serves many clients.")
@_option(_ROLE, "--server", metavar="HOST", help="Connect to the listening host: a name or an address.")
@_option(
    _NETWORK,
    "--address",
    metavar="CIDR",
    multiple=True,
    help="This host's address inside, such as 10.7.0.1/24 or fd07::1/64. Repeatable.",
)
@_option(
    _NETWORK,
    "--route",
    metavar="CIDR",
    multiple=True,
    help="A network to reach through the tunnel. Repeatable.",
)
@_option(
    _NETWORK,
    "--device",
    metavar="NAME",
    help="The TUN device (tun0): made and removed again, or used if it exists.",
)
@_option(
    _NETWORK,
    "--mtu",
    metavar="auto|N",
    help="Bytes of the largest packet inside (auto: what the path carries whole).",
)
@_option(_WIRE, "--port", metavar="N", help="UDP port of the listener (1234).")
@_option(_WIRE, "--bind", metavar="ADDR", help="Own address to listen on or to send from (any).")
@_option(
    _WIRE,
    "--allow",
    metavar="CIDR",
    multiple=True,
    help="Listener: take datagrams from this network alone. Repeatable.",
)
@_option(
    _WIRE,
    "--framing",
    metavar="auto|raw|pi",
    help="A datagram is the packet (raw), or has 4 bytes of packet information first, as lametun (auto).",
)
@_option(_SECRECY, "--key", metavar="FILE", help="Encrypt: WireGuard with the private key in this file.")
@_option(
    _SECRECY,
    "--peer",
    metavar="KEY[,CIDR]",
    multiple=True,
    help="The other side's public key, and its addresses inside when there are several. Repeatable.",
)
@_option(_PROCESS, "--user", metavar="NAME", help="Become this user once set up.")
@_option(_PROCESS, METRICS, **METRICS_ATTRIBUTES)
@_option(_PROCESS, "-v", "--verbose", count=True, help="Say more.")
@_option(_PROCESS, "-q", "--quiet", count=True, help="Warnings and errors only; twice: errors only.")
@_option(_PROCESS, "--log-format", metavar="text|json", default="text", help="Log lines on stderr (text).")
@_option(_SPEED, "--workers", metavar="N", help="Threads, each with a queue of the device and a socket (1).")
@_option(
    _SPEED,
    "--busy-poll",
    metavar="[USEC]",
    is_flag=False,
    flag_value=BUSY_POLL_US,
    help=f"Spin this long before sleeping: less latency, more CPU ({BUSY_POLL_US} without a value).",
)
@_option(
    _SPEED,
    "--fast-path",
    is_flag=True,
    help="The kernel carries known peers' packets (eBPF); they pass by this host's firewall of UDP.",
)
@_option(_SPEED, "--no-tun-offload", is_flag=True, help="No segmentation or checksum offload on the device.")
@_option(_SPEED, "--no-udp-gso", is_flag=True, help="No UDP_SEGMENT when sending.")
@_option(_SPEED, "--no-udp-gro", is_flag=True, help="No UDP_GRO when receiving.")
@_option(_SPEED, "--no-batch", is_flag=True, help="One packet a system call, as in the article.")
@_option(
    _OTHER,
    "--explain",
    is_flag=True,
    help="Print the equivalent ip commands, each with what it is for; do nothing.",
)
@click.version_option(__version__, message="fasttun %(version)s")
@click.help_option("--help", "-h")
@click.pass_context
def fasttun(ctx: click.Context, /, **given: Any) -> int:
    """Join two Linux hosts into one private network: packets into a TUN device here come out of one there.

    One side listens, the other names it as its server. Addresses, MTU and routes are set at start and put
    back at exit.
    """
    if ctx.invoked_subcommand is not None:
        _refuse_flags(ctx)
        return 0
    return run(given)


def _refuse_flags(ctx: click.Context) -> None:
    for parameter in ctx.command.params:
        name = parameter.name or ""
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            flag = max(parameter.opts, key=len)
            raise click.UsageError(
                f"{flag}: is not for the command {ctx.invoked_subcommand}; see fasttun {ctx.invoked_subcommand} --help"
            )


def run(given: dict[str, Any]) -> int:
    """Act on the flags: explain, or be the tunnel until a signal ends it."""
    from .. import log
    from ..config import TunnelConfig
    from ..errors import ConfigurationError

    user, form = given.pop("user"), given.pop("log_format")
    verbosity = given.pop("verbose") - given.pop("quiet")
    explain = given.pop("explain")
    key, peers = given.pop("key"), given.pop("peer")
    metrics = given.pop("metrics")
    if form not in log.FORMATS:
        raise ConfigurationError("log_format", f"{form!r} is not a log format", "use text or json")
    config = TunnelConfig(**_fields(given))
    account = _account(user)
    factory = None
    if key is not None or peers:
        from .encrypted import factory as encrypted

        log.configure(form, verbosity)
        factory = encrypted(config, key, peers)
    if explain:
        from .explain import explanation

        click.echo(explanation(config), nl=False)
        return 0
    log.configure(form, verbosity)
    from .serve import serve

    return serve(config, account=account, factory=factory, encrypted=factory is not None, metrics=metrics)


def _account(name: str | None) -> Any:
    if name is None:
        return None
    from .. import privileges

    return privileges.find(name)


def _fields(given: dict[str, Any]) -> dict[str, Any]:
    """Flags that were given, as fields of `TunnelConfig`; the others keep the field's own default."""
    fields: dict[str, Any] = {}
    for name, value in given.items():
        if value is None or value == () or value is False:
            continue
        if name.startswith("no_"):
            fields[name.removeprefix("no_")] = False
        elif name == "busy_poll":
            fields["busy_poll_us"] = value
        else:
            fields[name] = value
    return fields
