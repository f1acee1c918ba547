"""Every error a person can see says what to do about it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import swtpm_prop
from swtpm_prop import errors

PACKAGE = Path(swtpm_prop.__file__).parent
ERRORS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.Error)}
PURE = {"tpm", "translate"}
"""Their errors reach a person only through the ones that call them."""
SOURCES = [
    path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] not in PURE | {"errors.py"}
]


def is_empty(node: ast.AST | None) -> bool:
    """Whether it is "", or may be by one of its branches."""
    if isinstance(node, ast.IfExp):
        return is_empty(node.body) or is_empty(node.orelse)
    return isinstance(node, ast.Constant) and not node.value


def mendless(tree: ast.AST) -> list[int]:
    """Lines that make an error without a mend, and lines that let a ``mend`` be empty on its way to one."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            given = {word.arg: word.value for word in node.keywords}
            mend = given.get("mend", node.args[2] if len(node.args) > 2 else None)
            if (name in ERRORS and (mend is None or is_empty(mend))) or is_empty(given.get("mend")):
                lines.append(node.lineno)
        elif isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "mend" for target in node.targets):
            lines += [node.lineno] * is_empty(node.value)
        elif isinstance(node, ast.FunctionDef):
            positional = node.args.posonlyargs + node.args.args
            defaults = [*zip(reversed(positional), reversed(node.args.defaults), strict=False)]
            defaults += [(a, v) for a, v in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if v]
            lines += [node.lineno for argument, value in defaults if argument.arg == "mend" and is_empty(value)]
    return lines


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_error_has_a_mend(path: Path) -> None:
    assert mendless(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "text",
    [
        *('TrustError("a.b", "c")', 'errors.HostError("a.b", "c", "")', 'Error("a.b", "c", mend="")', 'mend = ""'),
        *('refused("c", mend="")', 'def refused(why, mend=""): ...', 'Error("a.b", "c", "d" if e else "")'),
    ],
)
def test_what_would_leave_a_person_alone_is_found(text: str) -> None:
    assert mendless(ast.parse(text))
    assert not mendless(ast.parse(text.replace('""', '"do"').replace('"c")', '"c", "do")')))
