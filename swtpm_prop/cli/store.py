"""``swtpm-prop store``: publish and follow stores, build the certificate index and ask it."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from swtpm_prop.cli import output, store_publish, store_sync
from swtpm_prop.cli.store_news import is_news
from swtpm_prop.errors import Error, TrustError, UsageError, WireError
from swtpm_prop.layout import Layout
from swtpm_prop.limits import CERTIFICATE_BYTES
from swtpm_prop.tpm.algorithms import ALGORITHMS
from swtpm_prop.trust import certificate, floors, issuers, sources
from swtpm_prop.trust.build import Summary, build
from swtpm_prop.trust.certificate import Certificate, format_time, parse_time
from swtpm_prop.trust.files import read_file
from swtpm_prop.trust.index import Claim, Index
from swtpm_prop.trust.issuers import Trust

_FILE = click.Path(path_type=Path)
_DIGEST = re.compile(r"(?:(sha1|sha256|sha384|sha512):)?([0-9a-f]+)")
_BY_DIGITS = {2 * algorithm.size: algorithm.name for algorithm in ALGORITHMS}
_index_option = click.option("--index", type=_FILE, default=Layout().index, show_default=True, help="The index.")


@click.group()
def command() -> None:
    """Publish certificates, follow who does, build and ask the index."""


for _verb in (
    store_publish.init,
    store_publish.root,
    store_publish.add,
    store_publish.revoke,
    store_publish.remove,
    store_publish.publish,
    store_sync.sync,
):
    command.add_command(_verb)


@command.command("build")
@click.argument("paths", nargs=-1, type=_FILE, metavar="[CERT|DIR]...")
@click.option("--trust", "trust_file", type=_FILE, default=Layout().trust, show_default=True, help="Known issuers.")
@click.option("--output", "to", type=_FILE, default=Layout().index, show_default=True, help="The index to replace.")
@click.option("--expires", metavar="TIME", help="Last moment guests believe it; default: its last certificate's end.")
@output.json_option
def build_(paths: tuple[Path, ...], trust_file: Path, to: Path, expires: str | None, as_json: bool) -> None:
    """Verify the certificates and replace the index: all of them, or nothing changes.

    Of a directory its *.json are taken. A certificate outside its validity window is no error: the index knows the
    window and guests are refused with that reason. Approval lists and lists of revoked hosts are no certificates:
    'host update' takes them; only 'store sync' takes both.
    """
    files = _files(paths)
    end = parse_time(expires) if expires else None
    trust, limits = issuers.load(trust_file), issuers.load_floors(trust_file)
    notes: list[tuple[Path, TrustError]] = []
    with output.progress(files, "verifying") as running:
        summary = build(to, _verified(running, trust, notes), end, _report, limits)
    if as_json:
        output.print_json({**_summary(summary), "notes": [{"file": str(f), "id": e.id} for f, e in notes]})
        return
    for file, error in notes:
        click.secho(TrustError(error.id, f"{file}: {error.what}", error.mend).line(), fg="yellow", err=True)
    click.echo(
        f"certificates: {summary.certificates}, entries: {summary.entries}, bytes: {summary.size};"
        f" guests believe it until {format_time(summary.expires)}"
    )


@command.command()
@click.argument("what", metavar="DIGEST|FILE")
@click.option("--property", "properties", multiple=True, metavar="URI", help="Ask for this property; repeatable.")
@_index_option
@output.json_option
def lookup(what: str, properties: tuple[str, ...], index: Path, as_json: bool) -> None:
    """Say which certificates cover a digest or a file, or why none does; exit status 1 if none.

    A file is tried as GRUB measures it (plain hash) and, if it is a PE image, as firmware does (Authenticode).
    """
    opened = Index.open(str(index))
    answers = [_answer(opened, name, measured, properties) for name, measured in _measurements(what)]
    if as_json:
        output.print_json(answers)
    else:
        for answer in answers:
            _print_answer(answer)
    if not any(answer["certified"] for answer in answers):
        raise click.exceptions.Exit(1)


@command.command()
@_index_option
@output.json_option
def stats(index: Path, as_json: bool) -> None:
    """Say what the index holds."""
    opened = Index.open(str(index))
    summary = Summary(opened.certificates, opened.entries, opened.expires, index.stat().st_size)
    limits = floors.from_text(opened.floors)
    claims = [{**_claim(claim), "entries": count} for claim, count in opened.claims()]
    if as_json:
        output.print_json({**_summary(summary), "floors": limits, "list": claims})
        return
    for name, value in _summary(summary).items():
        click.echo(f"{name:<13} {value}")
    for component, needed in limits.items():
        for uri, below in needed.items():
            click.echo(f"{'floor':<13} {component} {below} for {uri or 'every property'}")
    click.echo()
    _print_claims(claims)


# -- building -----------------------------------------------------------------------------------


def _files(paths: Sequence[Path]) -> list[Path]:
    """Directories become their ``*.json``, sorted; a leading dot is that of editors' and our own temporary files."""
    if not paths:
        raise UsageError(
            "usage.no-certificate",
            "no certificate or directory is named",
            "name files, or a directory that holds them as *.json",
        )
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(entry for entry in path.glob("[!.]*.json") if entry.is_file())
        else:
            files.append(path)
    return files


def _verified(files: Iterator[Path], trust: Trust, notes: list[tuple[Path, TrustError]]) -> Iterator[Certificate]:
    """Each certificate as it is verified; says of every one that is not why, and refuses them all at the end."""
    refused = 0
    for file in files:
        try:
            checked = certificate.verify(read_file(file, CERTIFICATE_BYTES), trust, None)
        except TrustError as error:
            refused += 1
            mend = "take it by 'swtpm-prop host update', and leave it out here" if is_news(file) else error.mend
            click.secho(TrustError(error.id, f"{file}: {error.what}", mend).line(), fg="red", err=True)
            continue
        try:
            certificate.check_window(checked, int(time.time()))
        except TrustError as error:
            notes.append((file, error))
        yield checked
    if refused:
        raise TrustError(
            "trust.refused",
            f"certificates that do not verify: {refused}; the index stays as it was",
            "remove or replace them",
        )


def _report(doing: str, _done: int) -> None:
    """Sorting and checking a million digests takes seconds; the bar shows only the reading."""
    if doing != "reading certificates" and sys.stderr.isatty():
        click.echo(f"{doing} ...", err=True)


# -- asking -------------------------------------------------------------------------------------

_MENDS = {
    "unknown": "have it certified, or bring the index up to date with store sync or store build",
    "mismatch": "that certificate is wrong about this file: have it revoked and a new one issued",
    "below-floor": "put a newer version there; the lowest that counts, the trust file and the store say",
    "property": "have it certified for that property too, or ask for one that the certificates below name",
    "expired": "have it certified anew; if that is done, fetch the new certificate with store sync or store build",
    "not-yet-valid": "wait until then; if this moment is past, set the clock of this host",
    "stale-index": "bring the index up to date with store sync or store build; until then guests believe none of it",
    "weak": "ask for its SHA-256, SHA-384 or SHA-512",
    "no-index": "make the index anew with store sync or store build",
}
"""What mends each refusal (`translate.verdict.Verdict`); ``ambiguous`` comes only of a TPM command."""


def _measurements(what: str) -> list[tuple[str, Mapping[str, bytes]]]:
    """What the argument may stand for: a digest, or a file under each way to measure it."""
    parts = _DIGEST.fullmatch(what)
    if parts and _BY_DIGITS.get(len(parts[2]), "") == (parts[1] or _BY_DIGITS.get(len(parts[2]))):
        return [(what, {_BY_DIGITS[len(parts[2])]: bytes.fromhex(parts[2])})]
    path = Path(what)
    if not path.is_file():
        raise UsageError(
            "usage.digest",
            f"'{what}' is neither a digest in lower-case hex nor a file",
            "check the name, or give a digest as sha256sum prints it",
        )
    plain = [("plain hash", subject.digests) for subject in sources.from_file(path)]
    try:
        return plain + [("Authenticode", subject.digests) for subject in sources.from_pe(path)]
    except WireError:
        return plain


def _answer(index: Index, name: str, measured: Mapping[str, bytes], properties: Sequence[str]) -> dict[str, Any]:
    """One verdict; without properties, which ones certificates give it now, and why not the others they speak of."""
    now = int(time.time())
    covering = [claim for claim, covered in index.matches(measured) if covered]
    spoken = sorted({uri for claim in covering for uri in claim.properties})
    asked = [tuple(properties)] if properties else [(uri,) for uri in spoken or [""]]
    verdicts = [(uris, index.judge(uris, measured, now)) for uris in asked]
    verdict = next((found for _, found in verdicts if found.certified), verdicts[0][1])
    refusals = dict.fromkeys((found.reason, found.detail) for _, found in verdicts if not found.certified)
    return {
        "measured": name,
        "digests": {algorithm: digest.hex() for algorithm, digest in measured.items()},
        "certified": verdict.certified,
        "properties": [uri for uris, found in verdicts if found.certified for uri in uris],
        "reason": verdict.reason,
        "detail": verdict.detail,
        "refusals": [{"reason": reason, "detail": detail} for reason, detail in refusals],
        "certificates": [_claim(claim) for claim in covering],
    }


def _claim(claim: Claim) -> dict[str, Any]:
    return {
        "id": claim.id,
        "issuer": claim.issuer,
        "notBefore": format_time(claim.not_before),
        "notAfter": format_time(claim.not_after),
        "properties": list(claim.properties),
        **({"component": claim.component, "version": claim.version} if claim.component else {}),
        **({"belowFloor": dict(claim.below)} if claim.below else {}),
    }


def _summary(summary: Summary) -> dict[str, Any]:
    return {**summary._asdict(), "expires": format_time(summary.expires)}


def _print_answer(answer: Mapping[str, Any]) -> None:
    if answer["certified"]:
        click.secho(f"{answer['measured']}: certified, {' '.join(answer['properties'])}", fg="green")
    for one in answer["refusals"]:
        what = f"{answer['measured']}: not certified, {one['detail']}"
        click.echo(Error(one["reason"], what, _MENDS[one["reason"]]).line())
    if answer["certificates"]:
        _print_claims(answer["certificates"])


def _print_claims(claims: Sequence[Mapping[str, Any]]) -> None:
    rows = [
        (c["id"], c["issuer"], c["notAfter"], c.get("component", ""), c.get("version", ""), " ".join(c["properties"]))
        for c in claims
    ]
    output.table(("Certificate", "Issuer", "Valid until", "Component", "Version", "Properties"), rows)
