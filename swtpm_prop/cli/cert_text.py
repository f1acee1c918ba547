"""How certificates and what they speak of are printed, for people and for programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from swtpm_prop.cli import output
from swtpm_prop.trust.certificate import Certificate, format_time
from swtpm_prop.trust.sources import COMPONENT, VERSION, Subject

_HEADERS = ("Component", "Version", "Algorithms", "Digest", "Subject")
"""The name comes last, where a long one widens no other row."""


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
        output.print_json({**summary(shown), "subjects": [for_programs(subject) for subject in shown.subjects]})
        return
    rows = [("certificate", shown.id), ("issuer", shown.issuer), ("serial", shown.serial)]
    rows += [("property", uri) for uri in shown.properties]
    rows += [("valid", f"{format_time(shown.not_before)} to {format_time(shown.not_after)}")]
    output.table(("Field", "Value"), rows)
    click.echo()
    output.table(_HEADERS, [(*columns, output.cut(name)) for *columns, name in map(_row, shown.subjects)])


def show_issued(issued: Sequence[tuple[Path, Certificate]], as_json: bool) -> None:
    """One line a certificate: where it is, what it is about."""
    if as_json:
        output.print_json([{"file": str(path), **summary(shown)} for path, shown in issued])
        return
    rows = [(str(path), *_origin(shown.subjects[0]), str(len(shown.subjects))) for path, shown in issued]
    output.table(("File", "Component", "Version", "Subjects"), rows)


def print_subjects(subjects: Iterable[Subject]) -> None:
    """All of them, one a line, names whole: what somebody is about to sign may say the worst at the end."""
    output.table(_HEADERS, [_row(subject) for subject in subjects])


def print_nothing(covered: int, hopeless: int, as_json: bool) -> None:
    """Nothing is left to certify, so nothing was written.

    Args:
        covered: measurements that certificates cover already.
        hopeless: measurements of property logs that no certificate mends.
        as_json: print for programs.
    """
    why = f"uncertified measurements that no certificate mends (violations, padded digests): {hopeless}"
    if as_json:
        output.print_json(None)
    elif not hopeless:
        click.secho("certificates cover all of it already; nothing was written", fg="green")
    elif covered:
        click.secho(f"certificates cover all else already, nothing was written; {why}", fg="yellow")
    else:
        click.secho(f"nothing in it can be certified, nothing was written; {why}", fg="yellow")


def for_programs(subject: Subject) -> dict[str, Any]:
    """A subject as `json.dumps` takes it."""
    digests = {algorithm: digest.hex() for algorithm, digest in subject.digests.items()}
    return {"name": subject.name, "digest": digests, "annotations": dict(subject.annotations)}


def _row(subject: Subject) -> tuple[str, ...]:
    first, *_ = subject.digests.items()
    return *_origin(subject), " ".join(subject.digests), f"{first[0]}:{first[1].hex()}", subject.name


def _origin(subject: Subject) -> tuple[str, str]:
    return subject.annotations.get(COMPONENT, ""), subject.annotations.get(VERSION, "")
