"""Where a certificate's subjects come from: files, PE images, unified kernel images, logs of a reference boot.

Every source is an iterator, so that a caller can show progress; nothing is ever typed by hand. All digests are
computed here, but for those of a log, which are what the reference guest's firmware and kernel measured.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from swtpm_prop import limits
from swtpm_prop.errors import TrustError, WireError, printable
from swtpm_prop.tpm import authenticode, pe
from swtpm_prop.tpm.algorithms import STRONG
from swtpm_prop.trust.measurements import LeftOut, Measurement, of_event_log, of_ima_list

_CHUNK = 1024 * 1024

UKI_SECTIONS = {
    *(".linux", ".osrel", ".cmdline", ".initrd", ".splash", ".dtb", ".pcrpkey"),
    *(".ucode", ".dtbauto", ".hwids", ".uname", ".sbat", ".profile", ".efifw"),
}
"""Sections that systemd-stub measures (UAPI group, unified kernel image specification); ``.pcrsig`` never is.

systemd-stub 252 measures the first line of them, later versions the others too.
"""


NO_ANNOTATIONS: Mapping[str, str] = MappingProxyType({})

COMPONENT = "component"
VERSION = "version"
PACKAGE = "package"


class Subject(NamedTuple):
    """One measurable thing.

    Attributes:
        name: for people; decides nothing.
        digests: by algorithm name, SHA-256, SHA-384 and SHA-512 only.
        annotations: what the issuer adds: COMPONENT and VERSION name the source package it is from, so that all
            versions below one can be revoked together; PACKAGE the binary package.
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
    image = _read(path)
    with _reading(path):
        sections = pe.sections(image)
        if ".linux" not in sections:
            raise TrustError(
                "source.not-uki", "no .linux section: not a unified kernel image", "certify it as PE image"
            )
        yield from of_image(printable(str(path)), image)


def of_image(name: str, image: bytes) -> Iterator[Subject]:
    """What `from_uki` says of a unified kernel image, what `from_pe` says of any other PE image.

    Raises:
        TrustError: ``source.command-line``.
        WireError: ``pe.*``.
    """
    yield _authenticode(name, image)
    sections = pe.sections(image)
    if ".linux" not in sections:
        return
    yield _authenticode(f"{name} .linux", sections[".linux"])
    for section, content in sections.items():
        if section in UKI_SECTIONS and content:
            yield _hashed(f"{name} section name {section}", section.encode() + b"\0")
            yield _hashed(f"{name} section {section}", content)
    if sections.get(".cmdline"):
        yield _hashed(f"{name} command line", _command_line(bytes(sections[".cmdline"])))


def from_event_log(data: bytes, left_out: LeftOut) -> Iterator[Subject]:
    """Every distinct measurement of a reference boot, in the order of its log, named by what the log says of it.

    SHA-1 digests and digests that are shorter ones padded with zeros are left out; a measurement that then has none is
    counted in ``left_out``. EV_NO_ACTION records are no measurements.

    Raises:
        TrustError: ``source.weak-log`` if no measurement of the log has a digest that counts.
        WireError: ``eventlog.*``.
    """
    mend = "boot the reference guest with the sha256 bank active"
    return _distinct(of_event_log(data), left_out, "the event log", mend)


def from_ima_list(data: bytes, left_out: LeftOut) -> Iterator[Subject]:
    """Every distinct measurement of an IMA list, by its SHA-256, in the order of the list.

    Violations are counted in ``left_out``. The boot aggregate is a subject; it stands for PCR 0 to 9 of that very boot.

    Raises:
        TrustError: ``source.weak-log`` if all of the list are violations.
        WireError: ``imalog.*``.
    """
    return _distinct(of_ima_list(data), left_out, "the IMA list", "boot the reference guest anew")


def _distinct(measurements: Iterable[Measurement], left_out: LeftOut, log: str, mend: str) -> Iterator[Subject]:
    """One subject for each set of digests, named as its first measurement, with all PCRs it went to."""
    first: dict[tuple[bytes, ...], Measurement] = {}
    pcrs: dict[tuple[bytes, ...], set[int]] = {}
    seen = False
    for measurement in measurements:
        seen = True
        if measurement.digests:
            digests = tuple(measurement.digests.values())
            first.setdefault(digests, measurement)
            pcrs.setdefault(digests, set()).add(measurement.pcr)
        else:
            left_out[measurement.weakness] += 1
    if seen and not first:
        raise TrustError("source.weak-log", f"{log} has no digest of SHA-256 or stronger that counts", mend)
    for key, measurement in first.items():
        where = ", ".join(map(str, sorted(pcrs[key])))
        yield Subject(f"{measurement.type} {measurement.description} (PCR {where})", measurement.digests)


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
        raise TrustError(
            "source.command-line", "the .cmdline section is not UTF-8", "build the image with a command line in UTF-8"
        ) from None
    return (re.sub(r"[\x01-\x1f]", " ", text).rstrip(" ") + "\0").encode("utf-16-le")


def _read(path: Path) -> bytes:
    with _reading(path), path.open("rb") as file:
        image = file.read(limits.IMAGE_BYTES + 1)
    if len(image) > limits.IMAGE_BYTES:
        raise TrustError(
            "source.too-big",
            f"{path}: more than {limits.IMAGE_BYTES} bytes",
            "check the name; a unified kernel image has 60 MB",
        )
    return image


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong with the file says which file."""
    try:
        yield
    except OSError as error:
        raise TrustError(
            "source.unreadable", f"cannot read {path}: {error.strerror}", "check the name, or let this user read it"
        ) from error
    except (WireError, TrustError) as error:
        mend = error.mend or "see that it came whole and is what the option asks for"
        raise type(error)(error.id, f"{path}: {error.what}", mend) from error
