#!/usr/bin/env python3
"""The other side, with asyncio: connects, and says each second how much crosses, until Ctrl-C.

    sudo python examples/connect.py 198.51.100.7 10.7.0.2/24
"""

import argparse
import asyncio
import contextlib

import fasttun


async def report(tunnel: fasttun.Forwarder) -> None:
    before = tunnel.stats()
    while True:
        await asyncio.sleep(1)
        now = tunnel.stats()
        out = now.outbound.bytes_out - before.outbound.bytes_out
        into = now.inbound.bytes_out - before.inbound.bytes_out
        print(f"out {out * 8 / 1e6:.1f} Mbit/s, in {into * 8 / 1e6:.1f} Mbit/s", flush=True)
        before = now


async def main() -> None:
    parser = argparse.ArgumentParser(description="The connecting side of a tunnel.")
    parser.add_argument("server", help="name or address of the listening host")
    parser.add_argument("address", nargs="?", default="10.7.0.2/24", help="inner address of this host")
    parser.add_argument("--port", type=int, default=1234)
    given = parser.parse_args()

    async with fasttun.Forwarder(server=given.server, address=given.address, port=given.port) as tunnel:
        server = await asyncio.to_thread(tunnel.wait_peer, 30)
        print(f"{server.endpoint} answers; the MTU is {tunnel.mtu}", flush=True)
        reporting = asyncio.create_task(report(tunnel))
        try:
            await tunnel.wait_closed()
        finally:
            reporting.cancel()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
