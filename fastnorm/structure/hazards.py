"""What in a forward's source a trace of one run cannot show."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from types import CodeType
from typing import Any


def entry_codes(forward: Callable[..., Any]) -> set[CodeType]:
    """The forward's code and that of its wrappers: what they are given is what the caller gave."""
    found = set()
    while True:
        found.add(forward.__code__)
        if not hasattr(forward, "__wrapped__"):
            return found
        forward = forward.__wrapped__


def hazard(code: CodeType, is_entry: bool) -> str:
    """What in the source of `code` a trace cannot show; empty for nothing."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return f"the source of {code.co_name} cannot be read"
    nodes = list(ast.walk(tree))
    stored = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    count = code.co_argcount + code.co_kwonlyargcount
    count += bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    unknown = stored | (set() if is_entry else set(code.co_varnames[1:count]))
    for node in nodes:
        if isinstance(node, ast.With | ast.Try | ast.Global | ast.Nonlocal | ast.Yield | ast.Await):
            return f"{code.co_name} has a {type(node).__name__.lower()} statement"
        outside = _changed_outside(node, code)
        if outside:
            return f"{code.co_name} changes {outside}"
        if isinstance(node, ast.Compare) and any(
            isinstance(one, ast.Is | ast.IsNot) for one in node.ops
        ):
            sides = [node.left, *node.comparators]
            if not all(_is_known(side, unknown) for side in sides):
                return f"{code.co_name} asks whether a value is None"
        if _is_type_call(node) and not all(
            isinstance(one, ast.Name) and one.id == "self"
            for one in ast.iter_child_nodes(node)
            if not (isinstance(one, ast.Name) and one.id == "type")
        ):
            return f"{code.co_name} asks for a type"
    return ""


def _changed_outside(node: ast.AST, code: CodeType) -> str:
    """The name of what a statement sets an item or attribute of, if that is no local."""
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign | ast.Delete):
        targets = node.targets
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        targets = [node.target]
    for target in targets:
        owner = target
        while isinstance(owner, ast.Attribute | ast.Subscript):
            owner = owner.value
        own = (*code.co_varnames, *code.co_cellvars)
        if owner is not target and isinstance(owner, ast.Name) and owner.id not in own:
            return owner.id
    return ""


def _is_known(side: ast.expr, unknown: set[str]) -> bool:
    """Whether `is` on this is asked of something that a call gives or a guard covers.

    That are constants, globals, and what the module or the caller gave; not what was computed.
    """
    while isinstance(side, ast.Attribute | ast.Subscript):
        side = side.value
        if _is_type_call(side):  # of self: any other is refused
            return True
    if isinstance(side, ast.Name):
        return side.id not in unknown
    return isinstance(side, ast.Constant)


def _is_type_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "type"
