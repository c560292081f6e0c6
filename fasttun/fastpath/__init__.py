"""The kernel carries the packets of known peers by itself: two eBPF programs, fed by the peer table.

Plain mode, framing raw, outer IPv4. The loop stays the authority: what it has not learned yet, or what needs a
decision, comes to it as without the fast path. docs/design.md, "Fast path", has the conditions and what it
bypasses.
"""

from .path import FastPath

__all__ = ["FastPath"]
