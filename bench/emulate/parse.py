"""PTX text as a list of instructions."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """`@guard opcode operands;`, in the order of the text."""

    text: str
    opcode: str  # up to the first dot
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]  # as written: a register, a number, {a, b}, [address]
    guard: str | None = None  # a predicate register
    unless: bool = False  # the guard is negated

    def has(self, modifier: str) -> bool:
        return modifier in self.modifiers


@dataclass(frozen=True)
class Program:
    """The instructions of an entry, and where its labels point."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


NAMED_FROM = 1_000_000  # numbers of registers that no compiler gives

_STATEMENT = re.compile(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)


def _operands(text: str) -> tuple[str, ...]:
    """Split at the commas that are within no braces or brackets."""
    found, depth, start = [], 0, 0
    for i, character in enumerate(text + ","):
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            found.append(text[start:i].strip())
            start = i + 1
    return tuple(operand for operand in found if operand)


def instruction(statement: str) -> Instruction:
    match = _STATEMENT.fullmatch(statement)
    if match is None:
        raise ValueError(f"no instruction: {statement!r}")
    negated, guard, name, rest = match.groups()
    opcode, *modifiers = name.split(".")
    return Instruction(
        statement, opcode, tuple(modifiers), _operands(rest.strip()), guard, bool(negated)
    )


def parse(ptx: str) -> Program:
    """The one entry of a module that Triton has compiled."""
    head = re.search(r"\.entry\s+\w+\(.*?\)[^{]*\{", ptx, re.DOTALL)
    assert head, "no entry"
    code = re.sub(r"//.*|/\*.*?\*/", "", ptx[head.end() :])
    code = _renamed(code[: re.search(r"^\}", code, re.MULTILINE).start()])  # type: ignore[union-attr]
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for part in re.split(r"[;\n]", code):
        statement = _unbraced(part.strip())
        while label := re.match(r"([$\w]+):(?!:)\s*", statement):
            labels[label[1]] = len(instructions)
            statement = statement[label.end() :]
        if statement and not statement.startswith("."):
            instructions.append(instruction(statement))
    return Program(tuple(instructions), labels)


def _renamed(code: str) -> str:
    """Registers of inline assembly, which have names of their own, as others of their type."""
    for i, (kind, name) in enumerate(re.findall(r"\.reg\s+\.(\w+)\s+([a-z]\w*)\s*;", code)):
        prefix = {"pred": "%p", "b16": "%rs", "b32": "%r", "b64": "%rd"}[kind]
        code = re.sub(rf"(?<![%.\w]){name}\b", f"{prefix}{NAMED_FROM + i}", code)
    return code


def _unbraced(statement: str) -> str:
    """Without the braces that open or close a scope; a vector has both."""
    while statement.count("{") > statement.count("}"):
        statement = statement.replace("{", "", 1).strip()
    while statement.count("}") > statement.count("{"):
        statement = statement[: statement.rindex("}")].strip()
    return statement
