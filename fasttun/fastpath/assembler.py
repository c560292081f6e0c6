"""eBPF instructions from Python: mnemonics, labels, machine code. Needs no compiler where a tunnel runs.

A program is a list of calls in the order of its instructions; `code()` resolves the labels. Encodings:
RFC 9669 (BPF instruction set architecture). Not for: what the programs do (`programs`), loading (`bpf`).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

__all__ = ["SIZES", "Assembler", "Register"]

SIZES = {1: 0x10, 2: 0x08, 4: 0x00, 8: 0x18}
"""Bytes of a load or store: the size bits of its opcode."""

_LD, _LDX, _ST, _STX, _ALU, _JMP, _ALU64 = 0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x07
_MEM, _ATOMIC, _IMM64 = 0x60, 0xC0, 0x18
_BY_REGISTER = 0x08
_PSEUDO_MAP_FD = 1
_ARITHMETIC = {"add": 0x00, "sub": 0x10, "mul": 0x20, "div": 0x30, "or": 0x40, "and": 0x50, "lsh": 0x60, "rsh": 0x70,
               "xor": 0xA0, "mov": 0xB0}
_CONDITIONS = {"always": 0x00, "==": 0x10, ">": 0x20, ">=": 0x30, "!=": 0x50, "<": 0xA0, "<=": 0xB0}
_CALL, _EXIT, _TO_BIG_ENDIAN = 0x85, 0x95, 0xDC


@dataclass(frozen=True)
class Register:
    """r0 to r10: 0 returns, 1 to 5 pass arguments and are lost in calls, 6 to 9 last, 10 is the frame."""

    number: int


@dataclass
class _Instruction:
    opcode: int
    destination: int = 0
    source: int = 0
    offset: int = 0
    immediate: int = 0
    label: str | None = None

    def code(self) -> bytes:
        return struct.pack("=BBhI", self.opcode, self.source << 4 | self.destination, self.offset,
                           self.immediate & 0xFFFFFFFF)


Operand = Register | int


class Assembler:
    """One program in the making. ValueError for an operand that no instruction takes, at `code()` for a label."""

    def __init__(self) -> None:
        self._instructions: list[_Instruction] = []
        self._labels: dict[str, int] = {}

    def label(self, name: str) -> None:
        """The next instruction's name, for jumps; they may only go forward."""
        if name in self._labels:
            raise ValueError(f"label {name!r} is set twice")
        self._labels[name] = len(self._instructions)

    def do(self, operation: str, destination: Register, operand: Operand) -> None:
        """`destination` = `destination` operation `operand`, in 64 bits. operation: add, sub, mul, or, and, …, mov."""
        self._operate(_ALU64 | _ARITHMETIC[operation], destination, operand)

    def mov(self, destination: Register, operand: Operand) -> None:
        self.do("mov", destination, operand)

    def big_endian(self, destination: Register, bits: int) -> None:
        """The lower `bits` (16, 32, 64) from this machine's order to the network's, the rest zero; and back."""
        self._add(_TO_BIG_ENDIAN, destination.number, immediate=bits)

    def load(self, size: int, destination: Register, base: Register, offset: int = 0) -> None:
        """`destination` = the `size` bytes (1, 2, 4, 8) at `base` + `offset`, in this machine's order."""
        self._add(_LDX | _MEM | SIZES[size], destination.number, base.number, offset)

    def store(self, size: int, base: Register, offset: int, operand: Operand) -> None:
        """The `size` bytes at `base` + `offset` = `operand`."""
        if isinstance(operand, Register):
            self._add(_STX | _MEM | SIZES[size], base.number, operand.number, offset)
        else:
            self._add(_ST | _MEM | SIZES[size], base.number, 0, offset, operand)

    def map(self, destination: Register, fd: int) -> None:
        """`destination` = the map that `fd` stands for; two instructions' room."""
        self._add(_LD | _IMM64, destination.number, _PSEUDO_MAP_FD, 0, fd)
        self._add(0)

    def jump(self, label: str) -> None:
        self._add(_JMP | _CONDITIONS["always"], label=label)

    def jump_if(self, left: Register, condition: str, right: Operand, label: str) -> None:
        """Goes to `label` if `left` condition `right`, unsigned, in 64 bits. condition: == != < <= > >=."""
        self._operate(_JMP | _CONDITIONS[condition], left, right, label)

    def call(self, helper: int) -> None:
        """A helper function of the kernel: r1 to r5 in, r0 out."""
        self._add(_CALL, immediate=helper)

    def exit(self) -> None:
        self._add(_EXIT)

    def code(self) -> bytes:
        """The machine code: 8 bytes an instruction, in this machine's byte order."""
        for index, instruction in enumerate(self._instructions):
            if instruction.label is not None:
                if instruction.label not in self._labels:
                    raise ValueError(f"no label {instruction.label!r}")
                instruction.offset = self._labels[instruction.label] - index - 1
                if instruction.offset < 0:
                    raise ValueError(f"the jump to {instruction.label!r} goes back")
        return b"".join(instruction.code() for instruction in self._instructions)

    def _operate(self, opcode: int, destination: Register, operand: Operand, label: str | None = None) -> None:
        if isinstance(operand, Register):
            self._add(opcode | _BY_REGISTER, destination.number, operand.number, label=label)
        else:
            self._add(opcode, destination.number, immediate=operand, label=label)

    def _add(self, opcode: int, destination: int = 0, source: int = 0, offset: int = 0, immediate: int = 0,
             label: str | None = None) -> None:
        if not -(1 << 31) <= immediate < 1 << 32:
            raise ValueError(f"{immediate} does not fit 32 bits")
        self._instructions.append(_Instruction(opcode, destination, source, offset, immediate, label))
