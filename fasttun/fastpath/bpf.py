"""bpf(2): maps, programs, and links to the traffic-control hooks (tcx) of a device.

All are descriptors; when the last one of a link is closed, by whatever end of the process, its program is off the
device. Source: include/uapi/linux/bpf.h. Not for: what the programs do (`programs`).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

from ..errors import DeviceError

__all__ = ["HASH", "PERCPU_ARRAY", "TCX_EGRESS", "TCX_INGRESS", "attach", "attached", "create_map", "delete",
           "load_program", "lookup", "update"]

HASH = 1
PERCPU_ARRAY = 6
TCX_INGRESS = 46
TCX_EGRESS = 47

_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _PROG_LOAD, _PROG_QUERY, _LINK_CREATE = 0, 1, 2, 3, 5, 16, 28
_SCHED_CLS = 3
_LICENSE = ctypes.create_string_buffer(b"Dual MIT/GPL")
_LOG_BYTES = 1 << 16
_CALL = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "loongarch64": 280, "ppc64le": 361}
"""Little-endian machines of 64 bits: the assembler writes their layout of an instruction."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _bpf(command: int, attributes: bytes) -> int:
    return _call(command, ctypes.create_string_buffer(attributes, len(attributes)))


def _call(command: int, buffer: ctypes.Array[ctypes.c_char]) -> int:
    number = _CALL.get(platform.machine())
    if number is None or struct.calcsize("P") != 8:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    result = int(_libc.syscall(ctypes.c_long(number), ctypes.c_int(command), buffer, ctypes.c_uint(len(buffer))))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def create_map(kind: int, key_size: int, value_size: int, entries: int, name: str) -> int:
    """The descriptor of a new map. OSError: EPERM without CAP_BPF, ENOSYS, ENOMEM."""
    return _bpf(_MAP_CREATE, struct.pack("=IIIIIII16s", kind, key_size, value_size, entries, 0, 0, 0, name.encode()))


def _pointer(buffer: ctypes.Array[ctypes.c_char]) -> int:
    return ctypes.addressof(buffer)


def update(fd: int, key: bytes, value: bytes) -> None:
    """Sets `key`'s value, whole: a program sees the old one or the new one. OSError E2BIG when the map is full."""
    key_buffer = ctypes.create_string_buffer(key, len(key))
    value_buffer = ctypes.create_string_buffer(value, len(value))
    _bpf(_MAP_UPDATE, struct.pack("=IIQQQ", fd, 0, _pointer(key_buffer), _pointer(value_buffer), 0))


def delete(fd: int, key: bytes) -> None:
    """Takes `key` out; nothing when it is not in."""
    buffer = ctypes.create_string_buffer(key, len(key))
    try:
        _bpf(_MAP_DELETE, struct.pack("=IIQQQ", fd, 0, _pointer(buffer), 0, 0))
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise


def lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """`key`'s value, None without one. value_size: of a per-processor map, for all possible processors."""
    key_buffer, value = ctypes.create_string_buffer(key, len(key)), ctypes.create_string_buffer(value_size)
    try:
        _bpf(_MAP_LOOKUP, struct.pack("=IIQQQ", fd, 0, _pointer(key_buffer), _pointer(value), 0))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return value.raw


def load_program(code: bytes, name: str, attach_type: int) -> int:
    """The descriptor of a program for tcx. DeviceError with the verifier's last words when it is refused."""
    instructions = ctypes.create_string_buffer(code, len(code))

    def load(log: ctypes.Array[ctypes.c_char] | None) -> int:
        return _bpf(_PROG_LOAD, struct.pack(
            "=IIQQIIQII16sII", _SCHED_CLS, len(code) // 8, _pointer(instructions), _pointer(_LICENSE),
            0 if log is None else 1, 0 if log is None else _LOG_BYTES, 0 if log is None else _pointer(log),
            0, 0, name.encode(), 0, attach_type))

    try:
        return load(None)
    except OSError as error:
        words = ""
        if error.errno in (errno.EACCES, errno.EINVAL):
            log = ctypes.create_string_buffer(_LOG_BYTES)
            try:
                return load(log)
            except OSError:
                words = " | ".join(log.value.decode(errors="replace").strip().splitlines()[-4:-1])
        if "!root" in words:
            words = "the verifier wants CAP_PERFMON, too"
        raise DeviceError("load a program for", name, error.errno or errno.EINVAL, words) from error


def attach(program: int, index: int, attach_type: int) -> int:
    """The descriptor of a link that runs `program` on the device `index`. OSError: EINVAL before Linux 6.6."""
    return _bpf(_LINK_CREATE, struct.pack("=IIIIIIQ", program, index, attach_type, 0, 0, 0, 0))


def attached(index: int, attach_type: int) -> int:
    """How many programs are on the device `index`, whoever's they are. OSError."""
    buffer = ctypes.create_string_buffer(struct.pack("=IIIIQIIQQQQ", index, attach_type, 0, 0, 0, 0, 0, 0, 0, 0, 0))
    _call(_PROG_QUERY, buffer)
    return int(struct.unpack_from("=I", buffer, 24)[0])
