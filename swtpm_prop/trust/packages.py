"""Certificate subjects of a whole release: everything that a guest measures of the files of packages.

Of each file, under the path it has in a guest:

- PE image: its Authenticode hash (PCR 4), of a unified kernel image all that depends on it (4, 9, 11, 12), its content;
- below BOOT_DIRECTORIES: its content, which boot loaders measure as they read it (9);
- every file: the measurements of IMA (10), which cover path and content: for each template of `ima.FILE_TEMPLATES`,
  unsigned, file hash SHA-256. IMA measures what is executed, mapped or loaded, and under ``tcb`` all that root reads.

IMA names a file by the path it finds, links resolved: a package's ``/bin/x`` is ``/usr/bin/x`` on a system with merged
``/usr`` and ``/bin/x`` in an initramfs or a tree without; both are certified. Only the SHA-256 of the template data is:
kernels that lack the hash of another bank pad a SHA-1 there.

Not covered, because it is not in a package: files that are changed, generated or diverted after unpacking (initrds made
on the guest, edited configuration), signed files (``security.ima``), other hashes (``ima_hash=``).
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, NoReturn

from swtpm_prop import limits
from swtpm_prop.errors import TrustError, WireError, printable
from swtpm_prop.tpm import ima
from swtpm_prop.tpm.algorithms import SHA256, STRONG
from swtpm_prop.trust import dpkg, sources
from swtpm_prop.trust.dpkg import Origin, merged
from swtpm_prop.trust.sources import COMPONENT, NO_ANNOTATIONS, PACKAGE, VERSION, Subject

BOOT_DIRECTORIES = (b"/boot/", b"/efi/", b"/usr/lib/grub/", b"/usr/lib/systemd/boot/", b"/usr/lib/shim/")
"""Where packages keep what boot loaders and firmware read."""

_CHUNK = 1024 * 1024
_PE = b"MZ"


def from_deb(deb: Path, *, with_ima: bool) -> Iterator[Subject]:
    """Everything a guest may measure of an installed .deb.

    Raises:
        TrustError: ``source.dpkg-missing``, ``source.deb``, ``source.too-big``.
    """
    annotations = annotate(dpkg.origin(deb))
    hashes: dict[bytes, bytes] = {}
    with dpkg.reading(deb):
        for path, content, link in dpkg.members(deb):
            hash, subjects = _of_content(path, content) if content else (hashes.get(link), [])
            if hash:
                hashes[path] = hash
                subjects += _of_ima(path, hash) if with_ima else []
            for subject in subjects:
                yield subject._replace(annotations=annotations)


def files(tree: Path) -> list[bytes]:
    """The absolute paths that the regular files of an unpacked tree have in a guest, sorted.

    Raises:
        TrustError: ``source.unreadable``.
    """
    root = os.fsencode(tree)
    if not tree.is_dir():
        raise TrustError(
            "source.unreadable", f"{tree} is no directory", "name the root directory of a mounted or unpacked system"
        )
    found = []
    for directory, _, names in os.walk(root, onerror=_unreadable):
        paths = (directory + b"/" + name for name in names)
        found += [b"/" + os.path.relpath(path, root) for path in paths if stat.S_ISREG(os.lstat(path).st_mode)]
    return sorted(found)


def from_tree(tree: Path, path: bytes, owners: Mapping[bytes, Origin], *, with_ima: bool) -> Iterator[Subject]:
    """Everything a guest may measure of one of `files`, annotated if one of `dpkg.owners` owns it.

    Raises:
        TrustError: ``source.unreadable``, ``source.too-big``, ``source.command-line``.
    """
    owner = owners.get(merged(path))
    annotations = annotate(owner) if owner else NO_ANNOTATIONS
    try:
        with Path(os.fsdecode(os.fsencode(tree) + path)).open("rb") as content:
            hash, subjects = _of_content(path, content)
    except OSError as error:
        _unreadable(error)
    for subject in subjects + (_of_ima(path, hash) if with_ima else []):
        yield subject._replace(annotations=annotations)


def annotate(owner: Origin) -> dict[str, str]:
    """The annotations of a subject that is from a package."""
    return {PACKAGE: owner.package, COMPONENT: owner.component, VERSION: owner.version}


def _of_content(path: bytes, content: IO[bytes]) -> tuple[bytes, list[Subject]]:
    """The file's SHA-256, and what is measured of it but for IMA."""
    name = printable(os.fsdecode(path))
    data = content.read(_CHUNK)
    if data.startswith(_PE):
        data += content.read(limits.IMAGE_BYTES)
        if len(data) > limits.IMAGE_BYTES:
            raise TrustError(
                "source.too-big", f"{name}: more than {limits.IMAGE_BYTES} bytes", "take the packages without it"
            )
    subjects = _of_image(name, data)
    wanted = STRONG if subjects or merged(path).startswith(BOOT_DIRECTORIES) else (SHA256,)
    states = {algorithm.name: hashlib.new(algorithm.name) for algorithm in wanted}
    while data:
        for state in states.values():
            state.update(data)
        data = content.read(_CHUNK)
    digests = {algorithm: state.digest() for algorithm, state in states.items()}
    if wanted is STRONG:
        subjects.append(Subject(name, digests))
    return digests[SHA256.name], subjects


def _of_image(name: str, data: bytes) -> list[Subject]:
    if not data.startswith(_PE):
        return []
    try:
        return list(sources.of_image(name, data))
    except WireError:
        # Programs for DOS begin alike; firmware would not load what is no PE image.
        return []
    except TrustError as error:
        raise TrustError(error.id, f"{name}: {error.what}", error.mend) from error


def _of_ima(path: bytes, sha256: bytes) -> list[Subject]:
    return [
        Subject(
            f"{printable(os.fsdecode(spelling))} {template}",
            {SHA256.name: hashlib.sha256(ima.file_measurement(template, spelling, sha256)).digest()},
        )
        for spelling in sorted({path, merged(path)})
        for template in ima.FILE_TEMPLATES
    ]


def _unreadable(error: OSError) -> NoReturn:
    raise TrustError(
        "source.unreadable", f"cannot read {error.filename!r}: {error.strerror}", "be root, or let this user read it"
    ) from error
