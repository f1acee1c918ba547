"""The operator's guide explains every message about hosts, keys and migrations, and none that does not exist."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import swtpm_prop
from swtpm_prop.attest import evidence, tpm_keys

PACKAGE = Path(swtpm_prop.__file__).parent
GUIDE = Path(__file__).parents[2] / "docs/operator-guide.md"
AREAS = frozenset(
    {"custody", "transfer", "host", "fleet", "agent", "tpm", "approvals", "attest", "migration", "uninstall"}
)
ID = re.compile(rf"(?:{'|'.join(sorted(AREAS))})\.[a-z0-9…]+(?:-[a-z0-9…]+)*")
"""An id; what the code puts together has … for each part that varies, and so has the guide."""

PARTS = {
    "attest.…": {f"attest.{id}" for _, id, _ in evidence._ONE_BOOT},
    "attest.…-…": {f"attest.…-{id}" for id in [*(id for _, id, _ in tpm_keys._FIXED), "decrypt", "sign"]},
}
"""What would stand for anything, from the tables that it is put together from."""

NO_MESSAGES = {"agent.service"}


def text(node: ast.AST) -> str:
    """A string of the code, … for each part that varies; empty for what is none."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text, node.values))
    if isinstance(node, ast.FormattedValue):
        return "…"
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def said(tree: ast.AST) -> Iterator[str]:
    """Ids that something is made or called with, but for what is well; and those in brackets in a text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") != "ok":
            yield from (found for found in map(text, node.args) if ID.fullmatch(found))
        yield from (found for found in re.findall(r"\[(\S+)\]", text(node)) if ID.fullmatch(found))


def code() -> set[str]:
    found = {id for path in PACKAGE.rglob("*.py") for id in said(ast.parse(path.read_text()))} - NO_MESSAGES
    return {part for id in found for part in PARTS.get(id, {id})}


def guide() -> list[str]:
    """The ids that begin a row of the guide's tables of messages."""
    messages = GUIDE.read_text().partition("\n## Messages\n")[2]
    first = re.findall(r"^\| (`[^|]*) \|", messages, re.MULTILINE)
    return [id for cell in first for id in re.findall("`([^`]+)`", cell) if id.split(".")[0] in AREAS]


def means(row: str, id: str) -> bool:
    return row == id or ("-" in row and re.fullmatch(re.escape(row).replace("…", ".+"), id) is not None)


def test_every_message_has_a_row() -> None:
    rows = guide()
    assert sorted(id for id in code() if not any(means(row, id) for row in rows)) == []


def test_every_row_is_of_a_message() -> None:
    ids = code()
    assert sorted(row for row in guide() if not any(means(row, id) for id in ids)) == []


def test_no_message_has_two_rows() -> None:
    assert [row for row, count in Counter(guide()).items() if count > 1] == []


def test_what_is_put_together_has_parts_that_are_known() -> None:
    assert [id for id in code() if re.fullmatch("[a-z]+[.…-]+", id)] == []


def test_a_message_is_found_however_it_is_written() -> None:
    made = (
        'HostError("host.a-b"), f("tpm.c", 1), warn(f"{d} [custody.e]: f"), AttestError(f"attest.{g}-h"), {"fleet.i"}'
    )
    assert set(said(ast.parse(made))) == {"host.a-b", "tpm.c", "custody.e", "attest.…-h"}
    assert not set(said(ast.parse('ok("host.fine", "all is well")')))
