"""PTX text of one kernel -> its instructions, with registers as numbered slots.

Constants, special registers and the addresses of symbols are slots as well, so that an operand is always a slot.
Names declared in a block ``{ }`` end with it, labels too: inline assembly repeats the same names again and again.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\(([^)]*)\)\s*((?:\.\w+[^{.]*)*)\{", re.S)
_PARAM = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr[^,]*?)?(\w+)(?:\[(\d+)\])?\s*(?:,|$)")
_DECLARED = re.compile(r"([%\w$]+)(?:<(\d+)>)?")
_INSTRUCTION = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)", re.S)
_ADDRESS = re.compile(r"([%\w$.]+)(?:\s*\+\s*(-?\w+))?")
_NUMBER = re.compile(r"-?\d")
BITS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "u16": 16, "u32": 32, "u64": 64, "s16": 16, "s32": 32,
        "s64": 64, "f16": 16, "f32": 32, "f64": 64}  # fmt: skip


@dataclass(frozen=True)
class Operand:
    """One operand: `kind` says which of the other fields count."""

    kind: str  # "register", "number", "symbol", "vector", "address" or "none" (for _)
    name: str = ""
    slot: int = -1
    value: int = 0  # of a number; the offset of an address
    parts: tuple["Operand", ...] = ()  # of a vector, of a|b; an address: base, then coordinates


@dataclass
class Instruction:
    """One instruction with its place in the text."""

    opcode: str
    operands: tuple[Operand, ...]
    guard: int | None  # slot of the predicate
    negated: bool
    target: int  # index of the instruction that a branch goes to
    line: int
    text: str

    @property
    def place(self) -> str:
        """Where it is and what it says."""
        return f"line {self.line}: {self.text[:160]}"


@dataclass
class Program:
    """One kernel. Slots from 0 are registers in the order of their declaration; `widths` are their bits."""

    name: str
    params: list[tuple[str, str, int]]  # name, kind ("u32", "u64", "tensormap", ...), bytes
    threads: int
    instructions: list[Instruction] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    shared_symbols: list[str] = field(default_factory=list)


class _Scope:
    """Names of a block: registers are slots, labels are indices of instructions."""

    def __init__(self, parent: "_Scope | None") -> None:
        self.parent, self.registers, self.labels = parent, dict[str, int](), dict[str, int]()

    def find(self, name: str, what: str) -> int | None:
        scope: _Scope | None = self
        while scope is not None:
            found: int | None = getattr(scope, what).get(name)
            if found is not None:
                return found
            scope = scope.parent
        return None


def _without_comments(text: str) -> str:
    """Comments and line directives become blanks; every line stays where it was."""
    text = re.sub(r"/\*.*?\*/", lambda found: "\n" * found[0].count("\n"), text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    return re.sub(r"^[ \t]*\.(loc|file)\b[^\n]*", "", text, flags=re.M)


def _pieces(body: str) -> Iterator[tuple[int, str]]:
    """Statements, labels with their colon, and braces of blocks, each with its offset; ends with the body's brace."""
    position, depth = 0, 1
    token = re.compile(r"\s*(?:([{}])|([$%\w]+):(?!:)|([^;]*?);)", re.S)
    while depth:
        found = token.match(body, position)
        if found is None:
            raise ValueError(f"no statement in {body[position : position + 60]!r}")
        position = found.end()
        start = found.start() + len(found[0]) - len(found[0].lstrip())
        if found[1]:
            depth += 1 if found[1] == "{" else -1
            yield start, found[1]
        else:
            yield start, found[2] + ":" if found[2] else found[3].strip()


def split(text: str) -> list[str]:
    """Parts between the commas outside brackets."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [*parts, current.strip()] if current.strip() else parts


def number(text: str) -> int:
    """Return an integer, or the bits of a float as PTX writes it."""
    if text[:2] in ("0f", "0F", "0d", "0D"):
        return int(text[2:], 16)
    return int(text.rstrip("U"), 0)


def _operand(text: str, scope: _Scope) -> Operand:
    """Parse one operand."""
    if text == "_":
        return Operand("none")
    if text[0] in "{[":
        inner = split(text[1:-1].strip())
        if text[0] == "{":
            return Operand("vector", parts=tuple(_operand(part, scope) for part in inner))
        base = _ADDRESS.fullmatch(inner[0])
        if base is None:
            raise NotImplementedError(f"address {text}")
        return Operand(
            "address",
            base[1],
            value=number(base[2] or "0"),
            parts=tuple(_operand(p, scope) for p in [base[1], *inner[1:]]),
        )
    if "|" in text:
        return Operand("vector", parts=tuple(_operand(part.strip(), scope) for part in text.split("|")))
    if _NUMBER.match(text) and "." not in text:  # a fraction is a symbol, which nothing that computes takes
        return Operand("number", value=number(text))
    slot = scope.find(text, "registers")
    return Operand("symbol", text) if slot is None else Operand("register", text, slot)


class _Reader:
    """Reads the pieces of a body into a program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.scope = _Scope(None)
        self.branches: list[tuple[Instruction, str, _Scope]] = []

    def take(self, piece: str, line: int) -> None:
        """Read one piece."""
        if piece == "{":
            self.scope = _Scope(self.scope)
        elif piece == "}":
            self.scope = self.scope.parent or self.scope
        elif piece.endswith(":"):
            self.scope.labels[piece[:-1]] = len(self.program.instructions)
        elif piece.startswith(".reg"):
            self._declare(piece)
        elif piece and not piece.startswith("."):
            self._instruction(piece, line)

    def _declare(self, piece: str) -> None:
        _, kind, names = piece.split(None, 2)
        for name, count in (found.groups() for found in map(_DECLARED.fullmatch, split(names)) if found):
            for one in [f"{name}{i}" for i in range(int(count))] if count else [name]:
                self.scope.registers[one] = len(self.program.widths)
                self.program.widths.append(BITS[kind[1:]])
                self.program.names.append(one)

    def _instruction(self, piece: str, line: int) -> None:
        found = _INSTRUCTION.fullmatch(piece)
        if found is None:
            raise NotImplementedError(f"line {line}: {piece}")
        negated, guard, opcode, rest = found.groups()
        slot = self.scope.find(guard, "registers") if guard else None
        if guard and slot is None:
            raise NotImplementedError(f"line {line}: no predicate {guard}")
        branch = opcode.split(".")[0] == "bra"
        operands = () if branch else tuple(_operand(text, self.scope) for text in split(rest))
        instruction = Instruction(opcode, operands, slot, negated == "!", -1, line, " ".join(piece.split()))
        if branch:
            self.branches.append((instruction, rest.strip(), self.scope))
        self.program.instructions.append(instruction)

    def finish(self) -> None:
        """Resolve the branches; labels may come after them."""
        for instruction, label, scope in self.branches:
            target = scope.find(label, "labels")
            if target is None:
                raise NotImplementedError(f"{instruction.place}: no label {label}")
            instruction.target = target


def parse(text: str) -> Program:
    """Read the one kernel of a PTX module."""
    text = _without_comments(text)
    entry = _ENTRY.search(text)
    if entry is None:
        raise ValueError("the text has no kernel")
    params = []
    for kind, name, size in (found.groups() for found in _PARAM.finditer(" ".join(entry[2].split()))):
        params.append((name, "tensormap" if size else kind, int(size) if size else BITS[kind] // 8))
    threads = re.search(r"\.reqntid\s+(\d+)|\.maxntid\s+(\d+)", entry[3])
    if threads is None:
        raise ValueError("the kernel does not say its number of threads")
    program = Program(entry[1], params, int(threads[1] or threads[2]))
    program.shared_symbols = re.findall(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[\]", text)
    reader = _Reader(program)
    before = text.count("\n", 0, entry.end()) + 1
    body = text[entry.end() :]
    position, line = 0, before
    for start, piece in _pieces(body):
        line += body.count("\n", position, start)
        position = start
        reader.take(piece, line)
    reader.finish()
    return program
