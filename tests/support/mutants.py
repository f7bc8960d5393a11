"""Small wrong changes of a source file, one at a time: what a good test suite notices.

A mutant replaces one piece of text, found through the syntax tree. Left alone is what no test
should notice: docstrings, annotations, decorators, ``__all__``, asserts, what a ``raise`` says, and
the examples of ops.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], tuple[str, tuple[str, ...]]] = {
    ast.Lt: ("<", ("<=", ">=")),
    ast.LtE: ("<=", ("<", ">")),
    ast.Gt: (">", (">=", "<=")),
    ast.GtE: (">=", (">", "<")),
    ast.Eq: ("==", ("!=",)),
    ast.NotEq: ("!=", ("==",)),
    ast.Is: ("is", ("is not",)),
    ast.IsNot: (r"is\s+not", ("is",)),
    ast.In: ("in", ("not in",)),
    ast.NotIn: (r"not\s+in", ("in",)),
}
ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.Pow: ("**", "*"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitOr: ("|", "&"),
    ast.BitAnd: ("&", "|"),
}
OPPOSITES = {
    "min": "max",
    "amin": "amax",
    "minimum": "maximum",
    "any": "all",
    "floor": "ceil",
    "maximum": "minimum",
    "max": "min",
    "amax": "amin",
    "all": "any",
    "ceil": "floor",
}


@dataclass(frozen=True)
class Mutant:
    """One change: ``source[start:stop]`` becomes ``text``."""

    operator: str
    start: int
    stop: int
    text: str
    line: int
    """Where it begins, from 1."""
    place: str
    """Qualified name of the function or class around it, empty at module level."""

    def applied(self, source: str) -> str:
        """The whole file with the change."""
        return source[: self.start] + self.text + source[self.stop :]

    def lines(self, source: str) -> tuple[str, str]:
        """What the lines around the change say before and after it, on one line each."""
        first = source.rfind("\n", 0, self.start) + 1
        last = source.find("\n", self.stop)
        last = len(source) if last < 0 else last
        before = source[first:last]
        after = source[first : self.start] + self.text + source[self.stop : last]
        return " ".join(before.split()), " ".join(after.split())


def mutants(source: str) -> list[Mutant]:
    """All mutants of a file, in the order of the text; a few may not compile."""
    found = dict.fromkeys(_Finder(source).found())
    return sorted(found, key=lambda mutant: (mutant.start, mutant.stop, mutant.text))


def compiles(source: str) -> bool:
    """Whether a changed file is still Python."""
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


class _Finder:
    """Walks the tree of one file."""

    def __init__(self, source: str) -> None:
        self.source = source
        # Columns of the syntax tree count bytes of UTF-8.
        self.rows = [row.encode() for row in source.splitlines(keepends=True)]
        self.starts = [0]
        for row in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(row))

    def found(self) -> Iterator[Mutant]:
        yield from self.visit(ast.parse(self.source), "")

    def offset(self, line: int, column: int) -> int:
        return self.starts[line - 1] + len(self.rows[line - 1][:column].decode())

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return (
            self.offset(node.lineno, node.col_offset),
            self.offset(node.end_lineno, node.end_col_offset),
        )

    def text(self, node: ast.expr | ast.stmt) -> str:
        start, stop = self.span(node)
        return self.source[start:stop]

    def visit(self, node: ast.AST, place: str) -> Iterator[Mutant]:
        for operator, start, stop, text in self.changes(node):
            line = self.source.count("\n", 0, start) + 1
            yield Mutant(operator, start, stop, text, line, place)
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            place = f"{place}.{node.name}" if place else node.name
        for child in _children(node):
            yield from self.visit(child, place)

    def changes(self, node: ast.AST) -> Iterator[tuple[str, int, int, str]]:
        """Name, span and new text of each change of this node itself."""
        match node:
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                for a, op, b in zip([left, *comparators], ops, comparators, strict=False):
                    old, new = COMPARISONS[type(op)]
                    for text in new:
                        yield from self.token("comparison", a, b, old, text)
            case ast.BinOp(left=a, op=op, right=b) if type(op) in ARITHMETIC:
                old, text = ARITHMETIC[type(op)]
                yield from self.token("arithmetic", a, b, re.escape(old), text)
            case ast.AugAssign(target=a, op=op, value=b) if type(op) in ARITHMETIC:
                old, text = ARITHMETIC[type(op)]
                yield from self.token("arithmetic", a, b, re.escape(old), text)
            case ast.BoolOp(op=op, values=values):
                old, text = ("and", "or") if isinstance(op, ast.And) else ("or", "and")
                for a, b in itertools.pairwise(values):
                    yield from self.token("and / or", a, b, old, text)
            case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
                name = "dropped not" if isinstance(node.op, ast.Not) else "dropped minus"
                yield name, *self.span(node), f"({self.text(operand)})"
            case ast.Constant(value=bool(value)):
                yield "constant", *self.span(node), str(not value)
            case ast.Constant(value=int() | float() as value):
                yield "constant", *self.span(node), repr(value + 1)
            case ast.Name(id=name) if name in OPPOSITES:
                yield "opposite", *self.span(node), OPPOSITES[name]
            case ast.Attribute(attr=name) if name in OPPOSITES:
                _, stop = self.span(node)
                yield "opposite", stop - len(name), stop, OPPOSITES[name]
            case ast.Call(args=[first, second, *_]) if not _odd_arguments(node, first, second):
                (start, _), (_, stop) = self.span(first), self.span(second)
                between = self.source[self.span(first)[1] : self.span(second)[0]]
                text = self.text(second) + between + self.text(first)
                if self.text(first) != self.text(second):
                    yield "swapped arguments", start, stop, text
        yield from self.statements(node)

    def statements(self, node: ast.AST) -> Iterator[tuple[str, int, int, str]]:
        match node:
            case ast.If(test=test) | ast.IfExp(test=test):
                yield "negated condition", *self.span(test), f"(not ({self.text(test)}))"
            case ast.comprehension(ifs=tests):
                for test in tests:
                    yield "negated condition", *self.span(test), f"(not ({self.text(test)}))"
            case ast.Raise() | ast.AugAssign() | ast.Continue() | ast.Break() | ast.Delete():
                yield "removed statement", *self.span(node), "pass"
            case ast.Expr(value=ast.Call()):
                yield "removed statement", *self.span(node), "pass"
            case ast.Assign(targets=[ast.Subscript() | ast.Attribute()]):
                yield "removed statement", *self.span(node), "pass"
            case ast.Return(value=ast.expr() as value) if not _is_none(value):
                yield "returned nothing", *self.span(node), "return None"
            case ast.FunctionDef(body=body) if not _returns_a_value(node):
                first = body[1] if _is_docstring(body[0]) and len(body) > 1 else body[0]
                if not isinstance(first, ast.Pass | ast.Raise) and not _is_docstring(first):
                    start, _ = self.span(first)
                    yield "returned early", start, start, "return; "

    def token(
        self, operator: str, a: ast.expr, b: ast.expr, old: str, new: str
    ) -> Iterator[tuple[str, int, int, str]]:
        """The operator between two operands; around it stand only blanks and parentheses."""
        start, stop = self.span(a)[1], self.span(b)[0]
        edges = r"\b" if old[0].isalpha() else ""
        if match := re.search(edges + old + edges, self.source[start:stop]):
            yield operator, start + match.start(), start + match.end(), new


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """What may be mutated below a node."""
    match node:
        case ast.Raise() | ast.JoinedStr() | ast.Assert() | ast.Import() | ast.ImportFrom():
            return
        case ast.Call(func=ast.Name(id="Case" | "_case")):
            return  # examples of an op, for the tests
        case ast.Call(func=ast.Name(id="cast"), args=[_, value]):
            yield value
        case ast.AnnAssign(value=value):
            if value is not None:
                yield value
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return
        case ast.Assign(targets=[ast.Name(id="__all__")]):
            return
        case (
            ast.FunctionDef(args=arguments, body=body)
            | ast.AsyncFunctionDef(args=arguments, body=body)
        ):
            yield from (default for default in arguments.defaults)
            yield from (default for default in arguments.kw_defaults if default is not None)
            yield from body
        case ast.Lambda(args=arguments, body=value):
            yield from arguments.defaults
            yield value
        case ast.ClassDef(body=body):
            yield from body
        case _:
            yield from ast.iter_child_nodes(node)


def _odd_arguments(call: ast.Call, *arguments: ast.expr) -> bool:
    """Whether swapping them says nothing: types come first in ``cast`` and ``isinstance``."""
    if isinstance(call.func, ast.Name) and call.func.id in ("Case", "_case", "cast", "isinstance"):
        return True
    return any(isinstance(node, ast.Starred | ast.GeneratorExp) for node in arguments)


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _returns_a_value(function: ast.FunctionDef) -> bool:
    """Whether it returns or yields anything; what nested functions do counts, to be safe."""
    return any(
        isinstance(node, ast.Yield | ast.YieldFrom)
        or (isinstance(node, ast.Return) and node.value is not None)
        for node in ast.walk(function)
    )
