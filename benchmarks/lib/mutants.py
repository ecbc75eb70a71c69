"""One-line mistakes ("mutants") that can be planted in a Python file, and a reproducible random sample of them.

    for mutant in itertools.islice(sample({"models/layers.py": text}, seed=0), 200):
        broken = mutant.apply(text)

A file is parsed, and each mistake is an edit of its text: the rest of the file, comments included, stays as it is.
Mistakes of one place (a constant plus or minus 1) are alternatives, of which the seed selects one. A mutant's rank in
the sample is a hash of the seed and of its line, so an edit elsewhere does not change which places are sampled.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==",
    "is": "is not", "is not": "is", "in": "not in", "not in": "in",
}  # fmt: skip
ARITHMETIC = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "/", "%": "*", "**": "*", "@": "*", "|": "&", "&": "|"}
OPPOSITES = [
    ("min", "max"), ("minimum", "maximum"), ("amin", "amax"), ("argmin", "argmax"), ("floor", "ceil"), ("any", "all"),
    ("zeros", "ones"), ("zeros_like", "ones_like"), ("startswith", "endswith"), ("update", "setdefault"),
]  # fmt: skip
COMMUTATIVE = {"min", "max", "minimum", "maximum", "gcd", "lcm"}
ONLY_HELP = {"help", "metavar", "description"}  # keywords of argparse
OPPOSITE = dict(OPPOSITES) | {second: first for first, second in OPPOSITES}
WITHOUT = {"sorted", "reversed", "abs", "int", "float", "round", "set", "list", "copy", "deepcopy"}  # f(x) -> x
# Messages are text, not behavior; and before Python 3.12 the parts of an f-string have no positions.
NOT_MUTATED = (ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal)


@dataclass(frozen=True)
class Edit:
    """Bytes `start` to `end` of a file become `text`."""

    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Mutant:
    """A mistake in a file. `name` identifies it as long as its line stays as it is."""

    name: str
    file: str
    line: int
    kind: str
    edit: Edit

    def apply(self, source: str) -> str:
        """Return the file with the mistake."""
        data = source.encode()
        return (data[: self.edit.start] + self.edit.text.encode() + data[self.edit.end :]).decode()

    def diff(self, source: str) -> str:
        """Return the lines that change, as `-old` and `+new`."""
        lines = difflib.unified_diff(source.splitlines(), self.apply(source).splitlines(), n=0, lineterm="")
        return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


def sample(sources: dict[str, str], seed: int) -> Iterator[Mutant]:
    """Yield a mutant of every place in the files (path -> text), in random order."""
    ranked = []
    for file, source in sources.items():
        lines, seen = source.splitlines(), Counter[tuple[str, str]]()
        for kind, line, edits in places(source):
            seen[lines[line - 1], kind] += 1
            key = "\0".join([str(seed), file, lines[line - 1].strip(), kind, str(seen[lines[line - 1], kind])])
            digest = hashlib.sha256(key.encode()).hexdigest()
            edit = edits[int(digest[-8:], 16) % len(edits)]
            ranked.append((digest, Mutant(digest[:10], file, line, kind, edit)))
    ranked.sort(key=lambda pair: pair[0])
    for _, mutant in ranked:
        if _compiles(mutant.apply(sources[mutant.file])):
            yield mutant


def _compiles(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def places(source: str) -> list[tuple[str, int, list[Edit]]]:
    """Return (kind, line, alternative edits) of every place of a file that can be mutated."""
    finder = _Finder(source)
    return [
        (kind, node.lineno, edits)
        for node in finder.nodes(finder.tree)
        for kind, edits in finder.mistakes(node)
        if edits
    ]


class _Finder:
    def __init__(self, source: str):
        self.data, self.tree = source.encode(), ast.parse(source)
        self.begins = [0]  # of each line, in bytes
        for line in self.data.splitlines(keepends=True):
            self.begins.append(self.begins[-1] + len(line))
        imports = (node for node in ast.walk(self.tree) if isinstance(node, ast.Import))
        self.modules = {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}
        self.statements: set[int] = set()  # calls that are a whole statement

    def nodes(self, node: ast.AST) -> Iterator[ast.AST]:
        """Every node that is executed: no annotations, messages, main blocks or imports for the type checker."""
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if not isinstance(child, ast.AST) or isinstance(child, NOT_MUTATED) or _is_special_block(child):
                    continue
                if isinstance(child, ast.Expr):
                    self.statements.add(id(child.value))
                yield child
                yield from self.nodes(child)

    def mistakes(self, node: ast.AST) -> Iterator[tuple[str, list[Edit]]]:
        """Kinds of mistakes at a node, each with its alternatives."""
        if isinstance(node, ast.Compare):
            for left, right in zip([node.left, *node.comparators], node.comparators, strict=False):
                yield "comparison", self.between(left, right, COMPARISONS)
        elif isinstance(node, ast.BinOp) and not _is_text(node):
            yield "arithmetic", self.between(node.left, node.right, ARITHMETIC)
        elif isinstance(node, ast.BoolOp):
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield "and or", self.between(left, right, {"and": "or", "or": "and"})
        elif isinstance(node, ast.Constant):
            yield "constant", self.constants(node)
        elif isinstance(node, ast.If | ast.While | ast.IfExp) and not isinstance(node.test, ast.Constant):
            if not isinstance(node.test, ast.UnaryOp):  # `not` has a mistake of its own
                yield "negation", [self.replace(node.test, f"not ({self.text(node.test)})")]
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield "negation", [self.replace(node, f"({self.text(node.operand)})")]
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield "removed statement", [self.replace(node, "pass")]
        elif isinstance(node, ast.AugAssign | ast.Raise | ast.Break | ast.Continue | ast.Delete):
            yield "removed statement", [self.replace(node, "pass")]
        elif isinstance(node, ast.Slice):
            yield "bound", self.shifted(node.lower, 1) + self.shifted(node.upper, -1)
        elif isinstance(node, ast.Call):
            yield from self.calls(node)

    def calls(self, node: ast.Call) -> Iterator[tuple[str, list[Edit]]]:
        """Mistakes in a call: another function, swapped arguments, a keyword left out, the call itself left out."""
        function, name = node.func, getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in OPPOSITE:
            _, end = self.span(function)
            yield "opposite", [Edit(end - len(name), end, OPPOSITE[name])]
        arguments = [self.text(argument) for argument in node.args]
        starred = any(isinstance(argument, ast.Starred) for argument in node.args[:2])
        if len(arguments) > 1 and arguments[0] != arguments[1] and not starred and name not in COMMUTATIVE:
            begin, end = self.span(node.args[0])[0], self.span(node.args[1])[1]
            middle = self.data[self.span(node.args[0])[1] : self.span(node.args[1])[0]].decode()
            yield "swapped arguments", [Edit(begin, end, arguments[1] + middle + arguments[0])]
        if name == "range":
            yield "bound", self.shifted(node.args[-1], -1) + self.shifted(node.args[-1], 1)
        yield "dropped keyword", [self.without(node, word) for word in node.keywords if word.arg not in ONLY_HELP]
        if id(node) in self.statements or node.keywords:
            return
        if name in WITHOUT and len(arguments) == 1:
            yield "removed call", [self.replace(node, f"({arguments[0]})")]
        elif not arguments and isinstance(function, ast.Attribute):
            receiver = self.text(function.value)
            if receiver not in self.modules and receiver != "super()":
                yield "removed call", [self.replace(node, receiver)]

    def constants(self, node: ast.Constant) -> list[Edit]:
        if isinstance(node.value, bool):
            return [self.replace(node, str(not node.value))]
        if isinstance(node.value, int | float):
            return [self.replace(node, repr(node.value + 1)), self.replace(node, repr(node.value - 1))]
        return []

    def between(self, left: ast.expr, right: ast.expr, table: dict[str, str]) -> list[Edit]:
        """The operator between two operands replaced; parentheses and line breaks around it stay."""
        begin, end = self.span(left)[1], self.span(right)[0]
        longest_first = sorted(table, key=len, reverse=True)
        found = re.search("|".join(map(re.escape, longest_first)), self.data[begin:end].decode())
        return [Edit(begin + found.start(), begin + found.end(), table[found[0]])] if found else []

    def shifted(self, bound: ast.expr | None, by: int) -> list[Edit]:
        if bound is None or isinstance(bound, ast.Constant | ast.Starred):
            return []
        return [self.replace(bound, f"{self.text(bound)} {'+' if by > 0 else '-'} 1")]

    def without(self, node: ast.Call, word: ast.keyword) -> Edit:
        """The call without one keyword and its comma."""
        spans = sorted(self.span(argument) for argument in [*node.args, *node.keywords])
        at = spans.index(self.span(word))
        if at + 1 < len(spans):
            return Edit(spans[at][0], spans[at + 1][0], "")
        return Edit(spans[at - 1][1] if at else spans[at][0], spans[at][1], "")

    def replace(self, node: ast.AST, text: str) -> Edit:
        return Edit(*self.span(node), text)

    def text(self, node: ast.AST) -> str:
        begin, end = self.span(node)
        return self.data[begin:end].decode()

    def span(self, node: ast.AST) -> tuple[int, int]:
        """First and last byte of a node; positions of `ast` count lines from 1 and columns in bytes."""
        assert isinstance(node, ast.expr | ast.stmt | ast.keyword)
        end_line, end_column = node.end_lineno, node.end_col_offset
        assert end_line is not None and end_column is not None
        return self.begins[node.lineno - 1] + node.col_offset, self.begins[end_line - 1] + end_column


def _is_special_block(node: ast.AST) -> bool:
    """Whether this is `if TYPE_CHECKING:` or `if __name__ == "__main__":`."""
    if not isinstance(node, ast.If):
        return False
    return any(isinstance(part, ast.Name) and part.id in ("TYPE_CHECKING", "__name__") for part in ast.walk(node.test))


def _is_text(node: ast.BinOp) -> bool:
    """Whether strings are joined or filled in: a message."""
    sides = (node.left, node.right)
    return any(isinstance(side, ast.JoinedStr) or isinstance(getattr(side, "value", None), str) for side in sides)
