"""Machine code of compiled kernels, read as text: loops, opcodes, and what must not stand where."""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton

_TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def available() -> bool:
    """Whether this Triton brings the tool that prints machine code."""
    return _TOOL.exists()


def machine_code(kernel: Any) -> tuple[int, int, list[tuple[int, str]]]:
    """(registers, bytes of stack, (address, instruction) of the whole kernel)."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage, code = (
            subprocess.run([_TOOL, flag, cubin], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"{_TOOL.name} must print REG and STACK, it printed {usage!r}; use the one of this Triton")
    lines = [(int(at, 16), text.strip()) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", code)]
    return int(found[1]), int(found[2]), lines


def hasty(lines: Sequence[str]) -> list[str] | None:
    """Loads and stores before ACQBULK, which waits for the kernel before; asking the cache for something is neither.

    None if nothing waits.
    """
    waits = [i for i, line in enumerate(lines) if "ACQBULK" in line]
    accesses = ("LDG", "LDGSTS", "UTMALDG", "LD", "STG", "ST", "ATOM", "ATOMG", "RED")
    return [line for line in lines[: waits[0]] if opcode(line) in accesses] if waits else None


def main_loop(lines: Sequence[tuple[int, str]]) -> tuple[int, int]:
    """(first, last address) of the longest loop, of those with tensor-core instructions where there are such."""
    spans = []
    before = ""
    for at, line in lines:
        target = re.search(r"BRA\b.*?(0x[0-9a-f]+)", line)
        # a wait that was moved out of the way ends in two branches: again, or back to where it belongs
        if target and int(target[1], 16) < at and opcode(before) != "BRA":
            spans.append((int(target[1], 16), at))
        before = line
    products = [at for at, line in lines if "MMA." in line]
    with_products = [(first, last) for first, last in spans if any(first <= at <= last for at in products)]
    return max(with_products or spans, key=lambda span: span[1] - span[0], default=(0, -1))


def _bare(line: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", line)


def opcode(line: str) -> str:
    """What an instruction does, without its modifiers."""
    return _bare(line).partition(" ")[0].partition(".")[0]


def _written(line: str) -> set[int]:
    """Registers that an instruction writes."""
    operation, _, operands = _bare(line).partition(" ")
    first = re.match(r"(?:P[0-9T],\s*)?R(\d+)\b", operands.strip())  # some write a predicate before it
    reads_only = ("STS", "STG", "STL", "ST", "RED", "BAR", "BRA", "LDGSTS", "WARPGROUP", "DEPBAR")
    if first is None or operation.split(".")[0] in reads_only:
        return set()
    width = 4 if ".128" in operation else 2 if ".64" in operation or ".WIDE" in operation else 1
    if operation.startswith("LDSM"):
        width = int(operation[-1]) if operation[-1] in "24" else 1
    if shape := re.search(r"HGMMA\.64x(\d+)x", operation):
        width = int(shape[1]) // 2
    return set(range(int(first[1]), int(first[1]) + width))


def early_overwrites(lines: Sequence[str]) -> list[str]:
    """Instructions that write a register operand of a wgmma before a wait has retired its group.

    The assembler of Triton 3.6 emits such code for products that accumulate in place.
    """
    groups: list[set[int]] = []  # operand registers of the committed groups, oldest first
    current: set[int] = set()
    found = []
    for line in lines:
        if wait := re.search(r"WARPGROUP\.DEPBAR.*gsb0, (0x[0-9a-f]+)", line):
            keep = int(wait[1], 16)
            groups = groups[-keep:] if keep else []
            continue
        if current.union(*groups) & _written(line):
            found.append(line)
        if operand := re.search(r"HGMMA.* R\d+, R(\d+), gdesc", line):
            current = current | set(range(int(operand[1]), int(operand[1]) + 4))
        if "HGMMA" in line and "gsb0" in line:
            groups.append(current)
            current = set()
    return found
