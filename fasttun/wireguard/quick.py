"""What wg-quick(8) does around a WireGuard device: hooks, MTU, name servers, routes, policy rules, firewall.

In the order of a tunnel's life:

    quick = Quick("wg0", config)
    quick.pre_up()                                  # PreUp
    with WireGuard(config, name="wg0", mtu=quick.mtu()) as tunnel:     # device, keys, addresses, MTU, up
        quick.apply(tunnel)                         # DNS, routes, PostUp; undoes itself when it fails
        tunnel.wait()
        quick.pre_down(tunnel)                      # PreDown, SaveConfig
        quick.undo()                                # policy rules, firewall, DNS; routes go with the device
    quick.post_down()                               # PostDown

Not for: the device itself (`tunnel`), the file's format (`config`), processes and their names (`fasttun.cli`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterable
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..endpoint import resolve
from ..errors import ConfigurationError, FasttunError
from ..mtu import path_mtu
from ..netlink import code_of, netlink
from .changes import RT_TABLE_MAIN, Firewall, PolicyRule, SourceMark, family_of, reported
from .dns import NameServers
from .journal import Journal
from .store import Store

if TYPE_CHECKING:
    from .config import Config
    from .tunnel import WireGuard

__all__ = ["HookError", "Quick", "clean_up", "run_hooks"]

OVERHEAD = 80
"""Bytes: an IPv6 and a UDP header, and WireGuard's 32, as wg-quick takes off whatever the family."""
USUAL_MTU = 1500
LARGEST_MTU = 9000 - OVERHEAD
"""Bytes: jumbo frames. A route over the loopback device would ask for buffers of 64 KiB a packet."""
FIRST_TABLE = 51820
"""The first routing table tried for a default route, and with it the mark; wg-quick's own."""

_RT_SCOPE_LINK = 253
_TABLES = {"local": 255, "main": RT_TABLE_MAIN, "default": 253}
_TABLE_FILES = ("/usr/share/iproute2/rt_tables", "/usr/lib/iproute2/rt_tables", "/etc/iproute2/rt_tables")
_TABLE_DIRECTORY = Path("/etc/iproute2/rt_tables.d")

Network = IPv4Network | IPv6Network

_log = logging.getLogger(__name__)


class HookError(FasttunError, RuntimeError):
    """A command of the configuration failed. hook: `PreUp` and so on; number: from 1, within its kind."""

    def __init__(self, interface: str, hook: str, number: int, how: str) -> None:
        self.hook = hook
        self.number = number
        super().__init__(f"{hook} command {number} of {interface} {how}")


class Quick:
    """One tunnel's surroundings. Not thread-safe; in the network namespace of the thread that calls.

    path: the configuration file, for SaveConfig and the hooks. journal: where changes are written down; None
    keeps them in memory. Raises ConfigurationError here, FasttunError from `pre_up` and `apply`.
    """

    def __init__(self, name: str, config: Config, *, path: Path | None = None, journal: Journal | None = None) -> None:
        self.name = name
        self.config = config
        self.path = path
        self._journal = journal if journal is not None else Journal()
        self._table = None if config.table in ("auto", "off") else _table_number(config.table)
        self._chosen_mark = 0
        self._routes: list[dict[str, Any]] = []
        self._added: dict[Network, dict[str, Any]] = {}

    def mtu(self) -> int:
        """Bytes: the file's, else the largest that fits the routes to the endpoints, else to the default gateway.

        Asks resolver and kernel, sends nothing itself. An endpoint without an address or a route does not count.
        """
        if self.config.mtu is not None:
            return self.config.mtu
        outer = max((_endpoint_mtu(peer.endpoint) for peer in self.config.peers if peer.endpoint), default=0)
        return min((outer or _default_route_mtu() or USUAL_MTU) - OVERHEAD, LARGEST_MTU)

    def pre_up(self) -> None:
        """Run PreUp, before there is a device."""
        self._hooks("PreUp", self.config.pre_up)

    def apply(self, tunnel: WireGuard) -> None:
        """Name servers, routes, PostUp, for a started tunnel. What fails half-way is undone, but no hook is."""
        try:
            servers = NameServers.of(self.name, self.config.dns)
            if servers is not None:
                self._journal.make(servers)
            self._route(tunnel)
            self._hooks("PostUp", self.config.post_up)
        except BaseException:
            self.undo()
            raise

    def follow(self, tunnel: WireGuard, config: Config) -> list[str]:
        """Go on with a changed `config`: its hooks at the end, its SaveConfig, routes to its peers' networks.

        A default route comes and goes with the next start only, as a new Table does. Never raises: what failed, in
        words.
        """
        before = self._networks()
        self.config = dataclasses.replace(config, table=self.config.table)
        if self.config.table == "off":
            return []
        wanted, whole = self._networks(), self._table is None
        errors = [f"the route {network} counts at the next start"
                  for network in sorted(before ^ wanted, key=str) if whole and network.prefixlen == 0]
        try:
            with netlink() as ipr:
                for network in set(self._added) - wanted:
                    if not whole or network.prefixlen:
                        _delete_route(ipr, self._added.pop(network))
                missing = wanted - set(self._added)
                self._add_routes(tunnel, ipr, [network for network in missing if not whole or network.prefixlen])
        except (FasttunError, OSError) as error:
            errors.append(str(error))
        return errors

    def _networks(self) -> set[Network]:
        return {network for peer in self.config.peers for network in peer.allowed_ips}

    def pre_down(self, tunnel: WireGuard) -> list[str]:
        """Run PreDown and do SaveConfig, while the tunnel still runs. Never raises: what failed, in words."""
        errors = self._hooks_at_end("PreDown", self.config.pre_down)
        if self.config.save_config and self.path is not None:
            if not tunnel.running:
                return [*errors, f"SaveConfig: the tunnel has ended by itself; {self.path} is as it was"]
            try:
                store = Store(self.path)
                with store.locked():  # not while an invitation is half-way into file and tunnel
                    store.save(self.running_config(tunnel))
            except (FasttunError, OSError) as error:
                errors.append(f"SaveConfig: {error}")
        return errors

    def running_config(self, tunnel: WireGuard) -> Config:
        """What SaveConfig writes: the tunnel as it runs, without the mark that was chosen here."""
        live = tunnel.config()
        if self._chosen_mark and live.fwmark == self._chosen_mark:
            live = dataclasses.replace(live, fwmark=self.config.fwmark)
        device = tunnel.device
        if device is None:
            return live
        # The kernel gives the device a link-local address of its own, anew each time.
        kept = tuple(a for a in device.addresses() if not a.ip.is_link_local or a in self.config.address)
        mtu = device.mtu() if self.config.mtu is not None else None
        return dataclasses.replace(live, address=kept, mtu=mtu)

    def undo(self) -> list[str]:
        """Take back all that `apply` did, hooks aside. Never raises: what failed, in words. Idempotent."""
        errors = self._journal.undo()
        routes, self._routes = self._routes, []
        if routes:
            with contextlib.suppress(OSError), netlink() as ipr:
                for route in reversed(routes):
                    _delete_route(ipr, route)
        return errors

    def post_down(self) -> list[str]:
        """Run PostDown, after the device is gone. Never raises: what failed, in words."""
        errors = self._hooks_at_end("PostDown", self.config.post_down)
        self._journal.note_hooks(ran=False)
        return errors

    # ---------------------------------------------------------------------------------------------- hooks

    def _hooks(self, hook: str, commands: Iterable[str]) -> None:
        for number, command in enumerate(commands, 1):
            self._journal.note_hooks(ran=True)
            _run_hook(self.name, hook, number, command, self.path)

    def _hooks_at_end(self, hook: str, commands: Iterable[str]) -> list[str]:
        return run_hooks(self.name, hook, commands, self.path)

    # --------------------------------------------------------------------------------------------- routes

    def _route(self, tunnel: WireGuard) -> None:
        if self.config.table == "off":
            return
        networks = self._networks()
        if networks:
            with netlink() as ipr:
                self._add_routes(tunnel, ipr, networks)

    def _add_routes(self, tunnel: WireGuard, ipr: Any, networks: Iterable[Network]) -> None:
        with reported("route into", self.name):
            index = socket.if_nametoindex(self.name)
        created = tunnel.device is not None and tunnel.device.created
        covered = _Covered(ipr, index) if self._table is None else None
        # The most specific first: a route that was added just now covers none of those that follow.
        for network in sorted(networks, key=lambda network: -network.prefixlen):
            if self._table is None and network.prefixlen == 0:
                self._default_route(tunnel, ipr, index, network, created)
            elif covered is None or network not in covered:
                self._add_route(ipr, index, network, self._table or RT_TABLE_MAIN, created)

    def _add_route(self, ipr: Any, index: int, network: Network, table: int, created: bool) -> None:
        spec: dict[str, Any] = {
            "family": family_of(network.version), "dst": str(network), "oif": index, "table": table,
        }
        if network.version == 4:
            spec["scope"] = _RT_SCOPE_LINK
        with reported(f"route {network} into", self.name, _route_hint(network, table)):
            ipr.route("add", **spec)
        self._added[network] = spec
        if not created:  # else the kernel takes them with the device
            self._routes.append(spec)

    def _default_route(self, tunnel: WireGuard, ipr: Any, index: int, network: Network, created: bool) -> None:
        """All packets into the tunnel, save its own: they carry the mark, and skip the table of that number.

        Of the main table only the default route is passed over, so that local networks stay local.
        """
        mark = self._mark(tunnel, ipr)
        version = network.version
        self._add_route(ipr, index, network, mark, created)
        if version == 4:
            self._journal.make(SourceMark.now())
        addresses = tunnel.device.addresses() if tunnel.device is not None else self.config.address
        own = tuple(str(address.ip) for address in addresses if address.version == version)
        self._journal.make(Firewall(Firewall.find_tool(), self.name, version, mark, own))
        priority = PolicyRule.free_priority(version)
        # The one that comes first is added first: nothing local goes astray in between.
        self._journal.make(PolicyRule(version, max(0, priority - 1), RT_TABLE_MAIN, fwmark=0))
        self._journal.make(PolicyRule(version, priority, mark, fwmark=mark))

    def _mark(self, tunnel: WireGuard, ipr: Any) -> int:
        """The mark of the tunnel's own datagrams, one chosen now if it has none; also the table's number."""
        if not tunnel.fwmark:
            self._chosen_mark = _free_table(ipr)
            tunnel.set_fwmark(self._chosen_mark)
        return tunnel.fwmark


def run_hooks(interface: str, hook: str, commands: Iterable[str], path: Path | None) -> list[str]:
    """Run them all, also after one that failed. Never raises: logs what failed, and returns it in words."""
    errors = []
    for number, command in enumerate(commands, 1):
        try:
            _run_hook(interface, hook, number, command, path)
        except HookError as error:
            _log.warning("%s", error)
            errors.append(str(error))
    return errors


def clean_up(name: str, journal: Journal) -> list[str]:
    """Undo what a killed tunnel has left, with PreDown and PostDown of its file when its hooks had begun.

    Never raises: what failed, in words.
    """
    config = None
    if journal.hooks and journal.config is not None:
        from .config import Config

        try:
            config = Config.read(journal.config)
        except (FasttunError, OSError) as error:
            _log.warning("PreDown and PostDown are not run: %s", error)
    # What they look for may be gone with the device: a failure tells nothing.
    if config is not None:
        run_hooks(name, "PreDown", config.pre_down, journal.config)
    errors = journal.undo()
    if config is not None:
        run_hooks(name, "PostDown", config.post_down, journal.config)
    return errors


def _run_hook(interface: str, hook: str, number: int, command: str, path: Path | None) -> None:
    """By bash as wg-quick sets it up, by sh where there is none. Its output is ours. HookError."""
    command = command.replace("%i", interface)
    _log.info("%s: %s", hook, command)
    bash = shutil.which("bash") or ("/bin/bash" if os.path.exists("/bin/bash") else None)
    # A command fails with the first of its parts that fails.
    words = [bash, "-O", "extglob", "-e", "-o", "pipefail", "-c"] if bash else ["/bin/sh", "-e", "-c"]
    # Names that wg-quick's own variables have, which files in the wild refer to.
    environment = {**os.environ, "INTERFACE": interface, "CONFIG_FILE": str(path or ""), "LC_ALL": "C"}
    try:
        status = subprocess.run([*words, command], env=environment).returncode
    except OSError as error:
        raise HookError(interface, hook, number, f"could not be run: {error.strerror}") from None
    if status < 0:
        raise HookError(interface, hook, number, f"was ended by a signal: {signal.strsignal(-status)}")
    if status:
        raise HookError(interface, hook, number, f"failed with exit status {status}")


# --------------------------------------------------------------------------------------------- asked of the kernel


class _Covered:
    """Networks that the main table leads into the device already, by its addresses for one."""

    def __init__(self, ipr: Any, index: int) -> None:
        self._networks: set[Network] = set()
        for route in ipr.route("dump", oif=index, table=RT_TABLE_MAIN):
            bits = 32 if route["family"] == socket.AF_INET else 128
            if route["family"] in (socket.AF_INET, socket.AF_INET6):
                any_address = "0.0.0.0" if bits == 32 else "::"
                self._networks.add(ip_network(f"{route.get('RTA_DST') or any_address}/{route['dst_len']}"))
        self._lengths = {(network.version, network.prefixlen) for network in self._networks}

    def __contains__(self, network: Network) -> bool:
        return any(
            network.supernet(new_prefix=length) in self._networks
            for version, length in self._lengths
            if version == network.version and length <= network.prefixlen
        )


def _delete_route(ipr: Any, spec: dict[str, Any]) -> None:
    try:
        ipr.route("del", **spec)
    except Exception as error:
        code = code_of(error)
        if code is None:
            raise
        if code not in (errno.ESRCH, errno.ENODEV, errno.ENOENT):
            _log.warning("cannot remove the route %s: %s", spec["dst"], os.strerror(code))


def _free_table(ipr: Any) -> int:
    """The first number from 51820 up that no route and no policy rule uses."""
    with reported("list", "the routing tables"):
        taken = {int(route.get("RTA_TABLE") or route["table"]) for route in ipr.get_routes()}
        for version in (4, 6):
            taken |= {int(rule.get("FRA_TABLE") or rule["table"]) for rule in ipr.get_rules(family=family_of(version))}
    table = FIRST_TABLE
    while table in taken:
        table += 1
    return table


def _route_hint(network: Network, table: int) -> Callable[[int], str]:
    def hint(code: int) -> str:
        if code == errno.EEXIST:
            where = "" if table == RT_TABLE_MAIN else f" table {table}"
            return f"there is one by another way: see `ip route show {network}{where}`"
        if network.version == 6 and code in (errno.EACCES, errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.ENODEV):
            return f"IPv6 is off here: turn it on, or take {network} out of AllowedIPs"
        return "run it as root" if code == errno.EPERM else ""

    return hint


def _endpoint_mtu(endpoint: str) -> int:
    """Bytes: the MTU of the way to `host:port`; 0 when there is none."""
    host, _, port = endpoint.rpartition(":")
    try:
        where = resolve(host.strip("[]"), int(port))[0]
        return path_mtu(where.host, where.scope_id)
    except (FasttunError, ValueError) as error:
        _log.debug("no MTU from the endpoint %s: %s", endpoint, error)
        return 0


def _default_route_mtu() -> int:
    """Bytes: of the main table's best default route, IPv4's before IPv6's; 0 when there is none."""
    with reported("find", "the default route"), netlink() as ipr:
        for version in (4, 6):
            routes = [
                route for route in ipr.route("dump", family=family_of(version), table=RT_TABLE_MAIN)
                if route["dst_len"] == 0 and _next_hop(route)
            ]
            if routes:
                best = min(routes, key=lambda route: int(route.get("RTA_PRIORITY") or 0))
                metrics = best.get("RTA_METRICS")
                own = metrics.get("RTAX_MTU") if metrics else None
                return int(own or ipr.link("get", index=_next_hop(best))[0].get("IFLA_MTU"))
    return 0


def _next_hop(route: Any) -> int:
    """The interface's index; 0 for a route that leads nowhere."""
    paths = route.get("RTA_MULTIPATH")
    return int(paths[0]["oif"] if paths else route.get("RTA_OIF") or 0)


def _table_number(text: str) -> int:
    """A number, or a name from iproute2's lists. ConfigurationError."""
    try:
        number = int(text, 0)
    except ValueError:
        names = _table_names()
        if text not in names:
            raise ConfigurationError(
                "Table", f"{text!r} is no routing table of this host",
                "use auto, off, a number, or a name from /etc/iproute2/rt_tables",
            ) from None
        number = names[text]
    if not 0 < number < 1 << 32:
        raise ConfigurationError("Table", f"{text} is no table's number", "use 1 to 4294967295")
    return number


def _table_names() -> dict[str, int]:
    names = dict(_TABLES)
    extra = sorted(_TABLE_DIRECTORY.glob("*.conf")) if _TABLE_DIRECTORY.is_dir() else []
    for path in [*map(Path, _TABLE_FILES), *extra]:
        with contextlib.suppress(OSError):
            for line in path.read_text().splitlines():
                words = line.partition("#")[0].split()
                if len(words) == 2:
                    with contextlib.suppress(ValueError):
                        names[words[1]] = int(words[0], 0)
    return names
