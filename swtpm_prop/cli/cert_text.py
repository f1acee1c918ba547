"""How certificates and what they speak of are printed, for people and for programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from swtpm_prop.cli import output
from swtpm_prop.errors import printable
from swtpm_prop.trust.certificate import Certificate, format_time
from swtpm_prop.trust.measurements import PADDED, VIOLATION, WEAK, LeftOut
from swtpm_prop.trust.sources import COMPONENT, VERSION, Subject

_HEADERS = ("Component", "Version", "Algorithms", "Digest", "Subject")
"""The name comes last, where a long one widens no other row."""


_WHY = {
    VIOLATION: "IMA violations (the file was open for writing)",
    PADDED: "padded digests alone",
    WEAK: "SHA-1 digests alone",
    "route": "commands that cannot be translated",
    "ambiguous": "commands with one algorithm twice",
    "below-floor": "versions below the lowest that counts on the host",
}
"""Why measurements are left out, in words."""


def summary(shown: Certificate) -> dict[str, Any]:
    """What a certificate says, without its subjects, for programs."""
    return {
        "id": shown.id,
        "issuer": shown.issuer,
        "created": format_time(shown.created),
        "notBefore": format_time(shown.not_before),
        "notAfter": format_time(shown.not_after),
        "serial": shown.serial,
        "properties": list(shown.properties),
        "subjectCount": len(shown.subjects),
    }


def show(shown: Certificate, as_json: bool) -> None:
    """What a certificate says, with every subject: who signs or trusts it must see them all."""
    if as_json:
        output.print_json(_whole(shown))
        return
    rows = [("certificate", shown.id), ("issuer", shown.issuer), ("serial", shown.serial)]
    rows += [("property", uri) for uri in shown.properties]
    rows += [("valid", f"{format_time(shown.not_before)} to {format_time(shown.not_after)}")]
    output.table(("Field", "Value"), rows)
    click.echo()
    output.table(_HEADERS, [(*columns, output.cut(name)) for *columns, name in map(_row, shown.subjects)])


def show_new(issued: Certificate, left_out: LeftOut, as_json: bool) -> None:
    """As `show`; programs also learn what was left out of it."""
    if as_json:
        output.print_json({**_whole(issued), "leftOut": left_out})
    else:
        show(issued, as_json)


def show_issued(issued: Sequence[tuple[Path, Certificate]], left_out: LeftOut, as_json: bool) -> None:
    """One line a certificate: where it is, what it is about."""
    if as_json:
        certificates = [{"file": str(path), **summary(shown)} for path, shown in issued]
        output.print_json({"certificates": certificates, "leftOut": left_out})
        return
    rows = [(str(path), *_origin(shown.subjects[0]), str(len(shown.subjects))) for path, shown in issued]
    output.table(("File", "Component", "Version", "Subjects"), rows)


def print_subjects(subjects: Iterable[Subject]) -> None:
    """All of them, one a line, names whole: what somebody is about to sign may say the worst at the end."""
    output.table(_HEADERS, [_row(subject) for subject in subjects])


def warn_left_out(left_out: LeftOut) -> None:
    """Say on standard error what of logs no certificate can speak of."""
    if left_out:
        reasons = ", ".join(f"{_WHY.get(reason, reason)}: {count}" for reason, count in sorted(left_out.items()))
        click.secho(printable(f"left out, for no certificate mends it: {reasons}"), fg="yellow", err=True)


def print_nothing(covered: int, left_out: LeftOut, as_json: bool) -> None:
    """Nothing is left to certify, so nothing was written.

    Args:
        covered: measurements that certificates cover already.
        left_out: measurements that no certificate mends.
        as_json: print for programs.
    """
    if as_json:
        output.print_json({"subjectCount": 0, "leftOut": left_out})
    elif not left_out:
        click.secho("certificates cover all of it already; nothing was written", fg="green")
    elif covered:
        click.secho("certificates cover all else already; nothing was written", fg="yellow")
    else:
        click.secho("nothing in it can be certified; nothing was written", fg="yellow")


def _whole(shown: Certificate) -> dict[str, Any]:
    return {**summary(shown), "subjects": [for_programs(subject) for subject in shown.subjects]}


def for_programs(subject: Subject) -> dict[str, Any]:
    """A subject as `json.dumps` takes it."""
    digests = {algorithm: digest.hex() for algorithm, digest in subject.digests.items()}
    return {"name": subject.name, "digest": digests, "annotations": dict(subject.annotations)}


def _row(subject: Subject) -> tuple[str, ...]:
    first, *_ = subject.digests.items()
    return *_origin(subject), " ".join(subject.digests), f"{first[0]}:{first[1].hex()}", subject.name


def _origin(subject: Subject) -> tuple[str, str]:
    return subject.annotations.get(COMPONENT, ""), subject.annotations.get(VERSION, "")
