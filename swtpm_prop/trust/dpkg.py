"""Debian packages as dpkg's own programs read them: what a .deb is and holds, who owns the files of a tree."""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple, cast

from swtpm_prop.errors import TrustError

_FORMAT = "${Package}\t${source:Package}\t${source:Version}\n"
_CHUNK = 1024 * 1024
_NAME = re.compile(r"[a-z0-9][a-z0-9.+-]{1,120}")
_VERSION = re.compile(r"[0-9][A-Za-z0-9.+:~-]{0,120}")


class Origin(NamedTuple):
    """Where a file is from: a binary package, and the source package and version that security advisories speak of."""

    package: str
    component: str
    version: str


class Member(NamedTuple):
    """A regular file of a .deb: its absolute path on a system that has it installed, and its content.

    ``content`` can be read until the next member is taken; it is None for a hard link to the file ``link``.
    """

    path: bytes
    content: IO[bytes] | None
    link: bytes = b""


def origin(deb: Path) -> Origin:
    """What the control file of a .deb says.

    Raises:
        TrustError: ``source.dpkg-missing``, ``source.deb``.
    """
    return _origin(_run("dpkg-deb", "-W", f"--showformat={_FORMAT}", str(deb.absolute())).rstrip("\n"), str(deb))


def members(deb: Path) -> Iterator[Member]:
    """The regular files of a .deb, in its order. Nothing is unpacked: dpkg-deb writes a stream, which is read here.

    Taking a member and reading its content may raise tarfile.TarError; see `reading`.

    Raises:
        TrustError: ``source.dpkg-missing``, ``source.deb``.
    """
    command = ["dpkg-deb", "--fsys-tarfile", str(deb.absolute())]
    with (
        reading(deb),
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as program,
        # Closed first, so that leaving early ends the program instead of waiting for it.
        cast(IO[bytes], program.stdout) as stream,
    ):
        yield from _members(stream)
        while stream.read(_CHUNK):
            pass
    if program.returncode:
        raise TrustError("source.deb", f"{deb} is no whole Debian package", "fetch it again")


@contextmanager
def reading(deb: Path) -> Iterator[None]:
    """Whatever goes wrong with the archive in a .deb is one error that names it.

    Raises:
        TrustError: ``source.dpkg-missing``, ``source.deb``.
    """
    try:
        yield
    except FileNotFoundError:
        raise _missing("dpkg-deb") from None
    except (tarfile.TarError, EOFError) as error:
        raise TrustError("source.deb", f"{deb} cannot be read: {error}", "fetch it again") from error


def owners(tree: Path) -> dict[bytes, Origin]:
    """Which package owns each path (merged, see `merged`), by the dpkg database of a tree; empty without one.

    Raises:
        TrustError: ``source.dpkg-missing``, ``source.deb``.
    """
    database = tree / "var/lib/dpkg"
    if not (database / "status").is_file():
        return {}
    form = _FORMAT + "${db-fsys:Files}"
    listed = _run("dpkg-query", f"--admindir={database.absolute()}", "-W", f"--showformat={form}")
    found: dict[bytes, Origin] = {}
    for line in listed.split("\n"):
        if not line.startswith(" "):
            owner = _origin(line, str(database)) if line else None
        elif owner:
            found[merged(os.fsencode(line[1:]))] = owner
    return found


def merged(path: bytes) -> bytes:
    """The path on a system whose /bin, /sbin and /lib* are links into /usr, as Debian's are (since 12, all)."""
    return b"/usr" + path if _ALIASED.match(path) else path


_ALIASED = re.compile(rb"/(bin|sbin|lib|lib32|lib64|libx32)/")


def _members(stream: IO[bytes]) -> Iterator[Member]:
    with tarfile.open(fileobj=stream, mode="r|", encoding="utf-8", errors="surrogateescape") as archive:
        for member in archive:
            if member.isreg():
                yield Member(_path(member.name), archive.extractfile(member))
            elif member.islnk():
                yield Member(_path(member.name), None, _path(member.linkname))


def _path(name: str) -> bytes:
    return os.path.normpath(b"/" + os.fsencode(name).lstrip(b"/"))


def _origin(line: str, where: str) -> Origin:
    package, _, rest = line.partition("\t")
    component, _, version = rest.partition("\t")
    if not (_NAME.fullmatch(package) and _NAME.fullmatch(component) and _VERSION.fullmatch(version)):
        raise TrustError(
            "source.deb",
            f"{where} has no proper package name, source and version: {line[:80]!r}",
            "take the package from its archive again",
        )
    return Origin(package, component, version)


def _run(*command: str) -> str:
    """Standard output, decoded so that every path survives."""
    try:
        done = subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise _missing(command[0]) from None
    if done.returncode:
        raise TrustError(
            "source.deb",
            f"{command[0]} refuses: {done.stderr.decode(errors='replace').strip()}",
            "see that it is a whole Debian package",
        )
    return os.fsdecode(done.stdout)


def _missing(program: str) -> TrustError:
    return TrustError("source.dpkg-missing", f"there is no {program} on this machine", "install dpkg")
