"""What ``swtpm-prop store`` does with approvals of hosts' states and lists of revoked hosts, beside certificates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from swtpm_prop.custody.approvals import PREDICATE_TYPE
from swtpm_prop.errors import Error, StoreError, TrustError
from swtpm_prop.layout import Layout
from swtpm_prop.limits import NEWS_BYTES
from swtpm_prop.trust import dsse
from swtpm_prop.trust.files import read_file
from swtpm_prop.trust.follow import Refusal
from swtpm_prop.trust.publisher import Publisher

_CRL = b"-----BEGIN X509 CRL-----"


def divide(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Certificates, and what is none: approval lists and lists of revoked hosts."""
    news = [file for file in files if is_news(file)]
    return [file for file in files if file not in news], news


def place(publisher: Publisher, files: Iterable[Path]) -> int:
    """Take these into the next publication, in the place of earlier editions; returns how many are new.

    Raises:
        StoreError: ``store.older``, ``store.busy``, ``store.absent``.
        AttestError, TrustError: as `news.identify`.
    """
    from swtpm_prop.attest.news import identify

    new = 0
    for file in files:
        data = read_file(file, NEWS_BYTES)
        edition = identify(data)
        known = publisher.news(edition.name)
        if known is not None and identify(known).number > edition.number:
            raise StoreError(
                "store.older", f"the store has a later edition of '{file}'", "add the newest that its maker has signed"
            )
        new += publisher.place(edition.name, data)
    return new


def install(layout: Layout, files: Sequence[Path]) -> tuple[list[str], list[Refusal]]:
    """Put into force what a store has; a host without keys of its own in its TPM has no use for it.

    Returns:
        What counts now, in words for people, and what this host does not accept.
    """
    if not files or not layout.host_keys.is_dir():
        return [], []
    # Here and above: tpm2_pytss comes with it and costs 130 ms.
    from swtpm_prop.attest import news

    installed, refused = [], []
    for file in files:
        try:
            installed.append(news.install(layout, read_file(file, NEWS_BYTES)))
        except Error as error:
            refused.append(Refusal(f"news/{file.name}", error))
    try:
        news.raise_epoch(layout, installed)
    except Error as error:
        refused.append(Refusal("the epoch of this host's TPM", error))
    return [each.what for each in installed], refused


def is_news(file: Path) -> bool:
    """By its beginning, or by what its payload says it is; what is unreadable is left to who reads certificates."""
    try:
        data = read_file(file, NEWS_BYTES)
        return data.lstrip().startswith(_CRL) or PREDICATE_TYPE.encode() in dsse.parse(data).payload
    except TrustError:
        return False
