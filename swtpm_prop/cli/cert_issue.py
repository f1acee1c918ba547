"""``swtpm-prop cert issue``: from files, packages and logs to signed certificates."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from swtpm_prop.cli import cert_text, explain, output, passphrase
from swtpm_prop.domain import causes
from swtpm_prop.errors import UsageError
from swtpm_prop.layout import Layout
from swtpm_prop.limits import EVENT_LOG_BYTES, IMA_LOG_BYTES
from swtpm_prop.trust import certificate, dpkg, packages, signers, sources
from swtpm_prop.trust.certificate import Certificate, Claim, parse_time
from swtpm_prop.trust.files import read_file, write_file
from swtpm_prop.trust.index import Index
from swtpm_prop.trust.measurements import LeftOut
from swtpm_prop.trust.sources import COMPONENT, PACKAGE, VERSION, Subject
from swtpm_prop.trust.version import sort_key

Task = Callable[[], Iterable[Subject]]
"""One step of the progress bar."""

_DAY = 86400
_FILE = click.Path(path_type=Path)


def _source(name: str, help: str, metavar: str = "FILE") -> Callable[[Any], Any]:
    return click.option(name, multiple=True, type=_FILE, metavar=metavar, help=help)


@click.command("issue")
@click.option("--issuer", required=True, metavar="URI", help="Who certifies, as the trust file names it.")
@click.option(
    "--key", "key_names", required=True, multiple=True, metavar="PEM|URI", help="A private key, e.g. hsm:2?label=X."
)
@click.option("--public-key", multiple=True, type=_FILE, metavar="PEM", help="The public half of each key by URI.")
@passphrase.option
@click.option("--property", "properties", required=True, multiple=True, metavar="URI", help="What is certified.")
@_source("--file", "A file: its plain hash, as GRUB measures what it reads.")
@_source("--pe", "A PE image: its Authenticode hash, as firmware measures what it loads.")
@_source("--uki", "A unified kernel image: all that firmware and systemd-stub measure of it.")
@_source("--deb", "A Debian package: all that firmware, boot loader and kernel may measure of its files.")
@_source("--tree", "An unpacked tree of packages, the same; attributed by its dpkg database, if it has one.", "DIR")
@_source("--event-log", "A TCG event log of a reference boot: everything it measured.")
@_source("--ima-log", "An IMA list of a reference boot (binary_runtime_measurements): everything it measured.")
@_source(
    "--from-log", "A guest's property log: what was not certified. Event logs and IMA lists only describe it then."
)
@click.option("--no-ima", is_flag=True, help="Of packages and trees, leave out what only IMA measures.")
@click.option("--component", metavar="NAME=VERSION", help="What everything is from that no package names.")
@click.option("--only-uncovered", is_flag=True, help="Leave out what the index covers, and ask before signing.")
@click.option("--index", type=_FILE, default=Layout().index, show_default=True, help="For --only-uncovered.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--not-before", metavar="TIME", help="First moment, like 2026-01-31T00:00:00Z; default now.")
@click.option("--not-after", metavar="TIME", help="Last moment.")
@click.option("--valid-days", type=click.IntRange(1, 36500), help="Instead of --not-after; default 365.")
@click.option("--output", "to", type=_FILE, metavar="FILE", help="Where the certificate goes.")
@click.option("--per-package", type=_FILE, metavar="DIR", help="Instead: one certificate a package, in this directory.")
@output.json_option
def command(
    issuer: str,
    key_names: tuple[str, ...],
    public_key: tuple[Path, ...],
    passphrase_file: Path | None,
    properties: tuple[str, ...],
    component: str | None,
    only_uncovered: bool,
    index: Path,
    yes: bool,
    not_before: str | None,
    not_after: str | None,
    valid_days: int | None,
    to: Path | None,
    per_package: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Certify that what is measured of these files has these properties."""
    if (to is None) == (per_package is None):
        raise UsageError("usage.output", "where to?", "give either --output or --per-package")
    now = int(time.time())
    first, last = _window(now, not_before, not_after, valid_days)
    left_out: LeftOut = Counter()
    subjects = _annotated(_subjects(_tasks(given, left_out)), component)
    cert_text.warn_left_out(left_out)
    found = len(subjects)
    if only_uncovered:
        subjects = _uncovered(subjects, index, properties, now)
    if only_uncovered or given["from_log"]:
        if not subjects:
            cert_text.print_nothing(found, left_out, as_json)
            return
        _confirm(subjects, yes, as_json)
    signing = signers.open_keys(key_names, map(signers.load_public, public_key), passphrase.ask(passphrase_file))

    def issue(group: Sequence[Subject], path: Path) -> Certificate:
        data = certificate.issue(Claim(issuer, properties, group, first, last), signing, now)
        write_file(path, data)
        return certificate.read(data)

    if to is not None:
        cert_text.show_new(issue(_distinct(subjects), to), left_out, as_json)
    elif per_package is not None:
        per_package.mkdir(exist_ok=True)
        grouped = _by_package(subjects)
        with output.progress(list(grouped.items()), "signing") as running:
            issued = [(per_package / name, issue(_distinct(group), per_package / name)) for name, group in running]
        cert_text.show_issued(issued, left_out, as_json)


def _window(now: int, not_before: str | None, not_after: str | None, valid_days: int | None) -> tuple[int, int]:
    if not_after is not None and valid_days is not None:
        raise UsageError("usage.validity", "--not-after and --valid-days exclude each other", "give one of them")
    first = parse_time(not_before) if not_before else now
    return first, parse_time(not_after) if not_after else first + (valid_days or 365) * _DAY


# -- subjects -----------------------------------------------------------------------------------


def _tasks(given: dict[str, Any], left_out: LeftOut) -> list[Task]:
    """What the source options name, in steps; those that read logs count what they leave out."""
    with_ima = not given["no_ima"]
    tasks: list[Task] = [partial(sources.from_file, path) for path in given["file"]]
    tasks += [partial(sources.from_pe, path) for path in given["pe"]]
    tasks += [partial(sources.from_uki, path) for path in given["uki"]]
    tasks += [partial(packages.from_deb, path, with_ima=with_ima) for path in given["deb"]]
    for tree in given["tree"]:
        owners = dpkg.owners(tree)
        steps = packages.files(tree)
        tasks += [partial(packages.from_tree, tree, path, owners, with_ima=with_ima) for path in steps]
    if given["from_log"]:
        known = explain.known(given["event_log"], given["ima_log"])
        return tasks + [partial(causes.uncertified, path, known, left_out) for path in given["from_log"]]
    logs = (
        ("event_log", sources.from_event_log, EVENT_LOG_BYTES),
        ("ima_log", sources.from_ima_list, IMA_LOG_BYTES),
    )
    return tasks + [
        partial(_read_first, take, path, most, left_out) for name, take, most in logs for path in given[name]
    ]


def _read_first(
    take: Callable[[bytes, LeftOut], Iterable[Subject]], path: Path, most: int, left_out: LeftOut
) -> Iterable[Subject]:
    return take(read_file(path, most), left_out)


def _subjects(tasks: Sequence[Task]) -> list[Subject]:
    if not tasks:
        raise UsageError("usage.no-subject", "nothing to certify", "name files, packages or logs; see --help")
    with output.progress(tasks, "hashing") as running:
        return [subject for task in running for subject in task()]


def _annotated(subjects: list[Subject], component: str | None) -> list[Subject]:
    if component is None:
        return subjects
    name, _, version = component.partition("=")
    if not (name and version):
        raise UsageError(
            "usage.component", f"'{component}' is not NAME=VERSION", "write for example --component linux=6.1.153-1"
        )
    sort_key(version)  # or the store could not tell which versions are below it
    named = {COMPONENT: name, VERSION: version}
    return [subject if subject.annotations else subject._replace(annotations=named) for subject in subjects]


def _distinct(subjects: Iterable[Subject]) -> list[Subject]:
    """The same measurement may come from several sources; the first name will do."""
    found: dict[tuple[bytes, ...], Subject] = {}
    for subject in subjects:
        found.setdefault(tuple(subject.digests.values()), subject)
    return list(found.values())


def _by_package(subjects: Iterable[Subject]) -> dict[str, list[Subject]]:
    """File name to subjects; ``unpackaged.json`` has what no package owns."""
    grouped: dict[str, list[Subject]] = {}
    for subject in subjects:
        package, version = (subject.annotations.get(name, "") for name in (PACKAGE, VERSION))
        # As apt names its files: a colon is no part of a portable file name.
        name = f"{package}_{version.replace(':', '%3a')}.json" if package else "unpackaged.json"
        grouped.setdefault(name, []).append(subject)
    return grouped


def _uncovered(subjects: Iterable[Subject], path: Path, properties: Sequence[str], now: int) -> list[Subject]:
    index = Index.open(str(path))
    try:
        return [subject for subject in subjects if not index.judge(properties, subject.digests, now).certified]
    finally:
        index.close()


def _confirm(subjects: Sequence[Subject], yes: bool, as_json: bool) -> None:
    if yes:
        return
    if as_json:
        raise UsageError("usage.confirm", "--json cannot ask whether to sign", "look at it without, then add --yes")
    cert_text.print_subjects(_distinct(subjects))
    click.confirm("Certify all of these?", abort=True, err=True)
