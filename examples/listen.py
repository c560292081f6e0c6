#!/usr/bin/env python3
"""The side with the known address: takes any number of clients until Ctrl-C.

    sudo python examples/listen.py 10.7.0.1/24

What it carries is neither encrypted nor authenticated: for labs and links that you trust.
"""

import argparse
import contextlib

import fasttun


def main() -> None:
    parser = argparse.ArgumentParser(description="The listening side of a tunnel.")
    parser.add_argument("address", nargs="?", default="10.7.0.1/24", help="inner address of this host")
    parser.add_argument("--port", type=int, default=1234)
    parser.add_argument("--allow", action="append", default=[], help="outer network that may send; repeatable")
    given = parser.parse_args()

    def greet(peer: fasttun.PeerStats) -> None:
        print(f"{', '.join(map(str, peer.addresses))} is at {peer.endpoint}", flush=True)

    tunnel = fasttun.Forwarder(
        listen=True, address=given.address, port=given.port, allow=given.allow, on_peer=greet)
    with tunnel:
        assert tunnel.device is not None
        print(f"{tunnel.device.name} listens on UDP port {tunnel.local_port}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            tunnel.wait()
    stats = tunnel.stats()
    print(f"out {stats.outbound.packets_out} packets, in {stats.inbound.packets_out} packets, "
          f"dropped {stats.outbound.dropped + stats.inbound.dropped}")


if __name__ == "__main__":
    main()
