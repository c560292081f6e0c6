"""Gives root's privileges away for good once the tunnel is set up, save the one that the undo needs.

User and group identities change in every thread (libc sees to that); capabilities are the calling
thread's own. So `drop` belongs before the workers start: they inherit what is left, and a thread that was
there before ends with no capability at all.
Not for: gaining privileges, and not for choosing when to drop them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import pwd
from collections.abc import Callable
from dataclasses import dataclass

from .errors import ConfigurationError, DeviceError

__all__ = ["Account", "drop", "find"]

_CAP_NET_ADMIN = 12  # linux/capability.h
_CAP_SETPCAP = 8
_CAPABILITY_VERSION_3 = 0x20080522
_PR_SET_KEEPCAPS = 8  # linux/prctl.h
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38


@dataclass(frozen=True)
class Account:
    """A user to become: its name, and the identities that the password database gives it."""

    name: str
    uid: int
    gid: int


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def find(name: str) -> Account:
    """Look `name` up, before anything is set up.

    ConfigurationError (field `user`): no such user, or root. DeviceError: this process may not become it.
    """
    try:
        entry = pwd.getpwnam(name)
    except (KeyError, ValueError):  # ValueError: a NUL inside
        raise ConfigurationError(
            "user", f"{name!r} is no user of this machine", "name an existing one, such as nobody"
        ) from None
    if entry.pw_uid == 0:
        raise ConfigurationError("user", f"{name!r} is root itself", "name an ordinary user, such as nobody")
    account = Account(entry.pw_name, entry.pw_uid, entry.pw_gid)
    if os.geteuid() not in (0, account.uid):
        hint = "start fasttun as root, or leave --user out"
        raise DeviceError("change user to", account.name, errno.EPERM, hint)
    return account


def drop(account: Account, *, keep_net_admin: bool = False) -> None:
    """Become `account`, with no way back. `keep_net_admin`: the calling thread, and those that it starts
    from now on, keep CAP_NET_ADMIN and nothing else.

    Call it in the main thread, which also closes the device. A failure half-way raises DeviceError; the
    process must then end. Nothing happens when the process is `account` already.
    """
    if os.getresuid() == (account.uid,) * 3:
        return
    try:
        _drop(account, keep_net_admin)
    except OSError as error:
        raise DeviceError("change user to", account.name, error.errno or errno.EPERM) from error


def _drop(account: Account, keep_net_admin: bool) -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    def prctl(option: int, value: int) -> None:
        if libc.prctl(option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3) != 0:
            raise _failure()

    _drop_bounding_set(prctl)
    prctl(_PR_SET_NO_NEW_PRIVS, 1)  # a setuid program started later gains nothing
    os.initgroups(account.name, account.gid)
    os.setresgid(account.gid, account.gid, account.gid)
    if keep_net_admin:
        prctl(_PR_SET_KEEPCAPS, 1)
    os.setresuid(account.uid, account.uid, account.uid)
    if keep_net_admin:
        _set_capabilities(libc, 1 << _CAP_NET_ADMIN)
        prctl(_PR_SET_KEEPCAPS, 0)
    _prove(account)


def _drop_bounding_set(prctl: Callable[[int, int], None]) -> None:
    with open("/proc/sys/kernel/cap_last_cap") as file:
        last = int(file.read())
    for capability in (*(c for c in range(last + 1) if c != _CAP_SETPCAP), _CAP_SETPCAP):
        try:
            prctl(_PR_CAPBSET_DROP, capability)
        except OSError as error:
            if error.errno != errno.EPERM:  # a container may withhold CAP_SETPCAP: no_new_privs is enough
                raise
            return


def _set_capabilities(libc: ctypes.CDLL, mask: int) -> None:
    header = _Header(_CAPABILITY_VERSION_3, 0)
    sets = (_Sets * 2)(_Sets(mask, mask, 0))
    if libc.capset(ctypes.byref(header), ctypes.byref(sets)) != 0:
        raise _failure()


def _prove(account: Account) -> None:
    """That it worked, asked of the kernel: the identities changed, and root is out of reach."""
    if os.getresuid() != (account.uid,) * 3 or os.getresgid() != (account.gid,) * 3:
        raise OSError(errno.EPERM, "identities did not change")
    try:
        os.setresuid(0, 0, 0)
    except PermissionError:
        pass
    else:
        raise OSError(errno.EPERM, "root could be had back")


def _failure() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))
