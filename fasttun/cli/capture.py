"""`fasttun capture`: packets of a running tunnel, printed, or as pcapng to a file or a pipe.

The tunnel writes; this reads, and ends with a line on stderr of how many there were and how many were missed.
Not for: taking packets from the loop (`fasttun.observe.capture`), how one is printed (`packets`).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from ..observe.stream import PcapngReader

__all__ = ["capture"]

_FIRST_WORDS = {"ip", "ip6", "tcp", "udp", "icmp", "icmp6", "proto", "src", "dst", "host", "net", "port", "not"}
"""What a filter begins with; another first word is the tunnel's name."""
_PIECE = 1 << 18
_HELP = """\b
The filter is a small part of pcap-filter(7):
  ip, ip6, tcp, udp, icmp, icmp6, proto N, [src|dst] host A, net A/N, port N; and, or, not
\b
Examples:
  fasttun capture -c 10
  fasttun capture tun0 tcp port 443 and not host 10.7.0.1
  fasttun capture -w - | wireshark -k -i -
  fasttun capture --what both -s 128 -w tunnel.pcapng
  fasttun capture --what outer --keys --handshake -w - wg0 | wireshark -k -i -
"""
_WARNING = """\
warning: {where} will hold this tunnel's PRIVATE KEY and the keys of its sessions, by --keys:
warning: who has it reads all that was captured, and can be this host. Guard it as the key; share it with nobody.
"""
_OLD_SESSIONS = "note: packets of sessions from before this cannot be decrypted; --handshake makes new sessions now\n"


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, epilog=_HELP)
@click.option("-w", "--write", metavar="FILE|-", help="Write pcapng there; - is standard output, for a pipe.")
@click.option("--what", type=click.Choice(["inner", "outer", "both"]), default="inner", show_default=True,
              help="Packets inside of the tunnel, the datagrams around them, or both.")
@click.option("-s", "--snap-length", type=click.IntRange(1, 262144), metavar="BYTES", help="Keep so much of each.")
@click.option("-c", "--count", type=click.IntRange(1), metavar="N", help="End after N packets.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), metavar="S", help="End after S seconds.")
@click.option("--keys", is_flag=True,
              help="With -w and --what outer or both: also the secret keys by which Wireshark decrypts WireGuard.")
@click.option("--handshake", is_flag=True, help="Make new WireGuard sessions first, so that all can be decrypted.")
@click.argument("words", nargs=-1, metavar="[NAME] [FILTER...]")
def capture(write: str | None, what: str, snap_length: int | None, count: int | None, seconds: float | None,
            keys: bool, handshake: bool, words: tuple[str, ...]) -> int:
    """Show the packets of the running tunnel, or of the one of that NAME, or write them as pcapng.

    The tunnel never waits for this: packets that come faster than they are written are missed, and counted.
    """
    if write == "-" and sys.stdout.isatty():
        raise click.UsageError("-w: standard output is a terminal; as in fasttun capture -w - | wireshark -k -i -")
    if keys:
        _check_keys_are_of_use(write, what, snap_length)
    name, text = _name_and_filter(" ".join(words).split())
    from ..observe.client import choose
    from ..observe.stream import PcapngReader, request

    reader = PcapngReader(parse=write is None)
    with contextlib.ExitStack() as stack:
        tunnel = choose(name)
        take, output = stack.enter_context(_output(write, reader, side=what == "both", secret=keys))
        if keys:
            told = _WARNING.format(where="the capture" if write == "-" else write)
            click.secho(told + ("" if handshake else _OLD_SESSIONS), err=True, nl=False, fg="red", bold=True)
        secrets = {"keys": keys, "handshake": handshake} if keys or handshake else {}
        sock, first = request(tunnel, what=what, filter=text, snap_length=snap_length, count=count, seconds=seconds,
                              **secrets)
        stack.enter_context(sock)
        with _ended_by_signal(sock):
            _pass_on(sock, first, take, output)
            _read_to_the_end(sock, reader)
    missed = "how many were missed is not known: the tunnel ended" if reader.missed is None else \
        f"{reader.missed} missed"
    click.echo(f"{reader.packets} packet{'' if reader.packets == 1 else 's'}, {missed}", err=True)
    return 0


def _check_keys_are_of_use(write: str | None, what: str, snap_length: int | None) -> None:
    """UsageError: secrets go nowhere by mistake."""
    if write is None:
        raise click.UsageError("--keys: is for a file or a pipe that is read by Wireshark: -w FILE")
    if what == "inner":
        raise click.UsageError("--keys: inner packets are not encrypted: --what outer or both")
    if snap_length is not None:
        raise click.UsageError("--keys: a packet that is cut short cannot be decrypted: leave out -s")


def _name_and_filter(words: list[str]) -> tuple[str | None, str]:
    """UsageError for a filter that is none."""
    from ..observe.filter import compile_filter

    name = words.pop(0) if words and words[0].lower() not in _FIRST_WORDS else None
    text = " ".join(words)
    try:
        compile_filter(text)
    except ConfigurationError as error:
        raise click.UsageError(f"filter: {error.problem}; {error.hint}") from None
    return name, text


@contextlib.contextmanager
def _output(write: str | None, reader: PcapngReader, *, side: bool,
            secret: bool) -> Iterator[tuple[Callable[[bytes], Any], int]]:
    """What takes the stream's pieces, and the descriptor whose reader may go. secret: in a file for its owner."""
    if write is None:
        yield (lambda data: _print(reader, data, side)), sys.stdout.fileno()
        return
    if write == "-":
        sys.stdout.flush()
        fd = os.dup(sys.stdout.fileno())
    else:
        fd = os.open(write, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        if secret and stat.S_ISREG(os.fstat(fd).st_mode):  # it may have been there before, open to others
            os.fchmod(fd, 0o600)
        yield (lambda data: _write(reader, data, fd)), fd
    finally:
        os.close(fd)


def _print(reader: PcapngReader, data: bytes, side: bool) -> None:
    from .packets import line

    text = "".join(line(packet, side=side) + "\n" for packet in reader.feed(data))
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def _write(reader: PcapngReader, data: bytes, fd: int) -> None:
    for _ in reader.feed(data):
        pass
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view):]


def _pass_on(sock: socket.socket, first: bytes, take: Callable[[bytes], Any], output: int) -> None:
    """Until the stream's end, or until nobody reads what is written; then asks for the end of the stream."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    if stat.S_ISFIFO(os.fstat(output).st_mode) or stat.S_ISSOCK(os.fstat(output).st_mode):
        poll.register(output, 0)  # reports what it always does: that the reader has gone
    data = first
    with contextlib.suppress(ConnectionResetError):
        while True:
            if data:
                try:
                    take(data)
                except BrokenPipeError:
                    return
            if any(fd == output for fd, _ in poll.poll()):
                return
            data = sock.recv(_PIECE)
            if not data:
                return


def _read_to_the_end(sock: socket.socket, reader: PcapngReader) -> None:
    """The statistics come last, also for who wants no more packets."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
        while data := sock.recv(_PIECE):
            for _ in reader.feed(data):
                pass


@contextlib.contextmanager
def _ended_by_signal(sock: socket.socket) -> Iterator[None]:
    """SIGINT and SIGTERM ask the tunnel for the end, which still writes what it has; the second one ends at once."""
    def end(_: int, __: Any) -> None:
        for number in former:
            signal.signal(number, signal.default_int_handler)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)

    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in former:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
