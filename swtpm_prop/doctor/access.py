"""Can the user swtpm runs as read everything the layer loads? Tried as that user, so ACLs and mounts count too."""

from __future__ import annotations

import json
import os
import pwd
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from swtpm_prop.account import Account, swtpm_account
from swtpm_prop.doctor.finding import Finding, Patient, ok, problem, warning
from swtpm_prop.doctor.swtpm import needed

Blocked = tuple[str, str]
"""A path that stands in the way, and why."""


def readable(patient: Patient) -> Iterator[Finding]:
    """Everything from the interpreter to the index, with every directory above it."""
    if patient.installed is None:
        return
    account = swtpm_account(patient.layout)
    if os.geteuid() != 0:
        yield warning("access.not-checked", f"only root can try what {_name(account)} can read", "run this as root")
        return
    blocked = try_as(account, patient.layout.root, files(patient))
    for path, reason in blocked:
        mend = f"let {_name(account)} in, for example: chmod a+rX {path}"
        yield problem("access.unreadable", f"{_name(account)} cannot read {path}: {reason}", mend)
    if not blocked:
        yield ok("access.readable", f"{_name(account)} can read all that is loaded into swtpm")


def _name(account: Account) -> str:
    return f"swtpm's user {pwd.getpwuid(account.uid).pw_name}"


def files(patient: Patient) -> list[Path]:
    """All that the layer loads, as the host names it; a directory here need only be passed through."""
    assert patient.installed is not None  # noqa: S101  (the caller looked)
    layout, listed = patient.layout, patient.installed
    package = patient.at(listed.package)
    inside = [layout.libexec / "swtpm", layout.guests, layout.run, *package.rglob("*.py")]
    if layout.index.exists():
        inside.append(layout.index)
    libraries = [library.path for library in needed(patient.at(listed.preload)) if library.path]
    outside = [Path(listed.python), Path(listed.preload), *libraries]
    return [*outside, *(Path("/") / path.relative_to(layout.root) for path in inside)]


def try_as(account: Account, root: Path, paths: Sequence[Path]) -> list[Blocked]:
    """What of ``paths`` (below ``root``) a process of that user cannot read; needs root.

    A child process gives up its rights for good and tries; it runs nothing else and touches nothing.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            found = _blocked_in_child(account, root, paths)
            with os.fdopen(writer, "w") as answer:
                json.dump(found, answer)
        except OSError as error:
            print(f"cannot try as user {account.uid}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return [(path, reason) for path, reason in json.loads(text)] if text else [("/", "the attempt itself failed")]


def _blocked_in_child(account: Account, root: Path, paths: Sequence[Path]) -> list[Blocked]:
    groups = os.getgrouplist(pwd.getpwuid(account.uid).pw_name, account.gid)
    os.chroot(root)
    os.chdir("/")
    resolved = [path.resolve() for path in paths]
    os.setgroups(groups)
    os.setresgid(account.gid, account.gid, account.gid)
    os.setresuid(account.uid, account.uid, account.uid)
    return list(dict.fromkeys(found for path in (*paths, *resolved) if (found := _blocked(path))))


def _blocked(path: Path) -> Blocked | None:
    """The outermost thing on the way to ``path`` that cannot be passed or read."""
    for part in [*reversed(path.parents), path]:
        try:
            part.lstat()
        except FileNotFoundError:
            return None  # missing for everyone; other checks say so
        except PermissionError as error:
            return str(part.parent), error.strerror or "refused"
        except OSError as error:
            return str(part), error.strerror or "refused"
    try:
        if path.is_dir():
            os.stat(path / ".")  # noqa: PTH116  (Path drops the dot)
        else:
            path.open("rb").close()
    except OSError as error:
        return str(path), error.strerror or "refused"
    return None
