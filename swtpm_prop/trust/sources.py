"""Where a certificate's subjects come from: files, PE images, unified kernel images, event logs of a reference boot.

Every source is an iterator, so that a caller can show progress; nothing is ever typed by hand. All digests are
computed here, but for those of an event log, which are what the reference guest's firmware measured.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from swtpm_prop import limits
from swtpm_prop.errors import TrustError, WireError, printable
from swtpm_prop.tpm import authenticode, eventlog, pe
from swtpm_prop.tpm.algorithms import STRONG, Digest
from swtpm_prop.tpm.eventlog_text import describe, type_name

_CHUNK = 1024 * 1024

UKI_SECTIONS = {
    *(".linux", ".osrel", ".cmdline", ".initrd", ".splash", ".dtb", ".pcrpkey"),
    *(".ucode", ".dtbauto", ".hwids", ".uname", ".sbat", ".profile", ".efifw"),
}
"""Sections that systemd-stub measures (UAPI group, unified kernel image specification); ``.pcrsig`` never is.

systemd-stub 252 measures the first line of them, later versions the others too.
"""

_PADDING = bytes(12)
"""A digest that ends so is a shorter one filled up with zeros (a SHA-1 in a SHA-256 bank), not a hash of anything."""


NO_ANNOTATIONS: Mapping[str, str] = MappingProxyType({})

COMPONENT = "component"
VERSION = "version"


class Subject(NamedTuple):
    """One measurable thing.

    Attributes:
        name: for people; decides nothing.
        digests: by algorithm name, SHA-256, SHA-384 and SHA-512 only.
        annotations: what the issuer adds: COMPONENT and VERSION name the package it is from, so that all versions
            below one can be revoked together.
    """

    name: str
    digests: Mapping[str, bytes]
    annotations: Mapping[str, str] = NO_ANNOTATIONS


def from_file(path: Path) -> Iterator[Subject]:
    """The file's plain hash: what GRUB measures (PCR 9) when it reads a kernel or initrd. Of any size.

    Raises:
        TrustError: ``source.unreadable``.
    """
    states = {algorithm.name: hashlib.new(algorithm.name) for algorithm in STRONG}
    with _reading(path), path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            for state in states.values():
                state.update(chunk)
    yield Subject(printable(str(path)), {name: state.digest() for name, state in states.items()})


def from_pe(path: Path) -> Iterator[Subject]:
    """The Authenticode hash: what firmware (PCR 4) and shim measure when they load this image.

    Raises:
        TrustError: ``source.unreadable``, ``source.too-big``.
        WireError: ``pe.*``.
    """
    image = _read(path)
    with _reading(path):
        yield _authenticode(printable(str(path)), image)


def from_uki(path: Path) -> Iterator[Subject]:
    """All that depends on a unified kernel image when OVMF, or systemd-boot under it, boots it.

    Observed with OVMF 2022.11, systemd-stub and systemd-boot 252, Linux 6.1 and 6.12:

    - PCR 4: the Authenticode hash of the image, and of its ``.linux`` section, which the stub loads as an image;
    - PCR 11: for each section of UKI_SECTIONS its name as ASCII with NUL, then its content;
    - PCR 9: the command line as the kernel gets it (UTF-16 with NUL), and the initrd, which is the same measurement
      as the content of ``.initrd``;
    - PCR 12: the command line, if systemd-boot passed it on: the same bytes as in PCR 9.

    Not covered, because it is not in the image: what firmware measures of itself and of its settings (PCR 0 to 3, 5,
    7: take these from an event log), systemd-boot (certify it as a PE image), a command line typed or passed
    instead of the embedded one, credentials and system extensions beside the image. With ``.pcrsig``,
    ``.pcrpkey`` or ``.ucode`` the initrd in PCR 9 is one that the stub composes; it is not covered either.

    Raises:
        TrustError: ``source.unreadable``, ``source.too-big``, ``source.not-uki``, ``source.command-line``.
        WireError: ``pe.*``.
    """
    name = printable(str(path))
    image = _read(path)
    with _reading(path):
        sections = pe.sections(image)
        if ".linux" not in sections:
            raise TrustError(
                "source.not-uki", "no .linux section: not a unified kernel image", "certify it as PE image"
            )
        yield _authenticode(name, image)
        yield _authenticode(f"{name} .linux", sections[".linux"])
        for section, content in sections.items():
            if section in UKI_SECTIONS and content:
                yield _hashed(f"{name} section name {section}", section.encode() + b"\0")
                yield _hashed(f"{name} section {section}", content)
        if sections.get(".cmdline"):
            yield _hashed(f"{name} command line", _command_line(bytes(sections[".cmdline"])))


def from_event_log(data: bytes) -> Iterator[Subject]:
    """Every distinct measurement of a reference boot, in the order of its log, named by what the log says of it.

    SHA-1 digests and digests that are shorter ones padded with zeros are left out; so is a measurement that then has
    none. EV_NO_ACTION records are no measurements.

    Raises:
        TrustError: ``source.weak-log`` if no measurement of the log has a digest that counts.
        WireError: ``eventlog.*``.
    """
    names: dict[tuple[Digest, ...], str] = {}
    pcrs: dict[tuple[Digest, ...], set[int]] = {}
    events = [event for event in eventlog.parse(data).events if event.type != eventlog.EV_NO_ACTION]
    for event in events:
        genuine = tuple(digest for digest in event.digests if _genuine(digest))
        if genuine:
            names.setdefault(genuine, f"{type_name(event)} {describe(event)}")
            pcrs.setdefault(genuine, set()).add(event.pcr)
    if events and not names:
        raise TrustError(
            "source.weak-log",
            "the event log has no digest of SHA-256 or stronger",
            "boot the reference guest with the sha256 bank active",
        )
    for genuine, name in names.items():
        where = ", ".join(map(str, sorted(pcrs[genuine])))
        yield Subject(f"{name} (PCR {where})", {digest.algorithm.name: digest.value for digest in genuine})


def _hashed(name: str, data: bytes | memoryview) -> Subject:
    return Subject(name, {algorithm.name: hashlib.new(algorithm.name, data).digest() for algorithm in STRONG})


def _authenticode(name: str, image: bytes | memoryview) -> Subject:
    return Subject(f"{name} Authenticode", authenticode.digests(image))


def _command_line(section: bytes) -> bytes:
    """The load options systemd-stub makes of ``.cmdline``: UTF-16LE with NUL.

    The text ends at the first NUL, control characters become spaces, spaces at the end go, those at the start stay.
    """
    try:
        text = section.split(b"\0")[0].decode("utf-8")
    except UnicodeDecodeError:
        raise TrustError("source.command-line", "the .cmdline section is not UTF-8") from None
    return (re.sub(r"[\x01-\x1f]", " ", text).rstrip(" ") + "\0").encode("utf-16-le")


def _genuine(digest: Digest) -> bool:
    return digest.algorithm in STRONG and not digest.value.endswith(_PADDING) and set(digest.value) != {0xFF}


def _read(path: Path) -> bytes:
    with _reading(path), path.open("rb") as file:
        image = file.read(limits.IMAGE_BYTES + 1)
    if len(image) > limits.IMAGE_BYTES:
        raise TrustError("source.too-big", f"{path}: more than {limits.IMAGE_BYTES} bytes")
    return image


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong with the file says which file."""
    try:
        yield
    except OSError as error:
        raise TrustError("source.unreadable", f"cannot read {path}: {error.strerror}") from error
    except (WireError, TrustError) as error:
        raise type(error)(error.id, f"{path}: {error.what}", error.mend) from error
