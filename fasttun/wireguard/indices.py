"""Receiver indices: the random 32-bit names of handshakes and keypairs (paper §5.4.2, I_i and I_r).

Random, so that they tell nothing about how many sessions there are, and never given out twice at once.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["IndexTable"]

T = TypeVar("T")


class IndexTable(Generic[T]):
    """Maps an index to its owner. `random_index`: a source of 32-bit numbers, replaced in tests."""

    def __init__(self, random_index: Callable[[], int] = lambda: secrets.randbits(32)) -> None:
        self._random_index = random_index
        self._owners: dict[int, T] = {}

    def allocate(self, owner: T) -> int:
        """A free index, from now on `owner`'s. Terminates: peers are bounded far below 2**32 indices."""
        while True:
            index = self._random_index()
            if index not in self._owners:
                self._owners[index] = owner
                return index

    def reassign(self, index: int, owner: T) -> None:
        """Give an allocated index to `owner`, as when a handshake becomes a keypair. KeyError if it is free."""
        if index not in self._owners:
            raise KeyError(index)
        self._owners[index] = owner

    def release(self, index: int) -> None:
        """Free `index`; nothing happens when it is free."""
        self._owners.pop(index, None)

    def get(self, index: int) -> T | None:
        """The owner, or None."""
        return self._owners.get(index)

    def __len__(self) -> int:
        return len(self._owners)
