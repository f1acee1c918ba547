"""``swtpm-prop pcr``: the values to seal to or to expect in a quote, known before anything boots."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from swtpm_prop.cli import output
from swtpm_prop.errors import DomainError, UsageError
from swtpm_prop.limits import BANK_PROPERTIES, DOMAIN_XML_BYTES
from swtpm_prop.tpm.algorithms import BY_NAME, STRONG, HashAlgorithm
from swtpm_prop.tpm.pcr import build_selection
from swtpm_prop.translate.policy import HELD, UNMEASURED, Bank, held_value, unmeasured_value
from swtpm_prop.trust.files import read_file
from swtpm_prop.trust.uri import check_property

_CC_POLICY_PCR = 0x0000017F
_VALUES: dict[str, Callable[[Bank], bytes]] = {HELD: held_value, UNMEASURED: unmeasured_value}
_NAMES = [algorithm.name for algorithm in STRONG]


@click.group()
def command() -> None:
    """Predict PCR values to seal to or to expect in a quote."""


@command.command()
@click.option("--property", "properties", multiple=True, metavar="URI", help="A property of the bank; name all.")
@click.option("--bank", type=click.Choice(_NAMES), default="sha384", show_default=True, help="The property bank.")
@click.option("--domain-xml", type=click.Path(path_type=Path), metavar="FILE", help="Take all banks of a domain.")
@click.option("--state", type=click.Choice([HELD, UNMEASURED]), default=HELD, show_default=True, help="Of which state.")
@click.option("--pcrs", metavar="LIST", help="The PCRs to seal to, like 4,7,11-14.")
@click.option("--policy", is_flag=True, help="Print the policy digest of TPM2_PolicyPCR over --pcrs instead.")
@click.option("--policy-hash", type=click.Choice(_NAMES), default="sha256", show_default=True, help="Of the object.")
@output.json_option
def predict(
    properties: tuple[str, ...],
    bank: str,
    domain_xml: Path | None,
    state: str,
    pcrs: str | None,
    policy: bool,
    policy_hash: str,
    as_json: bool,
) -> None:
    """Print the value of a property PCR: it depends on nothing but the bank and its properties."""
    if bool(properties) == bool(domain_xml):
        raise UsageError("usage.properties", "give either --property or --domain-xml", "give one of them, and only one")
    if policy and pcrs is None:
        raise UsageError("usage.pcrs", "--policy needs --pcrs", "name the PCRs to seal to, for example --pcrs 4,7")
    chosen = _chosen(pcrs)
    banks = _domain_banks(domain_xml) if domain_xml else (_bank(BY_NAME[bank], properties, chosen),)
    if policy:
        _print_policies(banks, chosen, state, BY_NAME[policy_hash], as_json)
    else:
        _print_values(banks, chosen, state, as_json)


def policy_pcr(algorithm: HashAlgorithm, bank: HashAlgorithm, values: dict[int, bytes]) -> bytes:
    """The policyDigest after one TPM2_PolicyPCR in a fresh session (TPM 2.0 Library, part 3 section 23.7).

    Args:
        algorithm: the session's hash, which is the nameAlg of the object to seal.
        bank: which PCR bank is selected.
        values: PCR to its value, ``bank.size`` bytes each.

    Returns:
        ``algorithm.size`` bytes: H(0... || TPM_CC_PolicyPCR || TPML_PCR_SELECTION || H(values in PCR order)).
    """
    joined = b"".join(value for _, value in sorted(values.items()))
    selection = build_selection(((bank, tuple(sorted(values))),))
    digest = hashlib.new(algorithm.name, joined).digest()
    head = bytes(algorithm.size) + struct.pack(">I", _CC_POLICY_PCR)
    return hashlib.new(algorithm.name, head + selection + digest).digest()


def _chosen(pcrs: str | None) -> frozenset[int]:
    """The PCRs of --pcrs; empty if it is not there."""
    # Here and below: lxml comes with it and costs 30 ms.
    from swtpm_prop.domain.pcrs import parse_pcrs

    try:
        return parse_pcrs(pcrs) if pcrs is not None else frozenset()
    except DomainError as error:
        raise UsageError("usage.pcrs", error.what, error.mend) from error


def _bank(algorithm: HashAlgorithm, properties: tuple[str, ...], pcrs: frozenset[int]) -> Bank:
    if len(properties) > BANK_PROPERTIES:
        raise UsageError(
            "usage.properties",
            f"a bank has at most {BANK_PROPERTIES} properties",
            "leave some out, or certify one property that stands for several",
        )
    for uri in properties:
        check_property(uri)
    return Bank(algorithm, pcrs, True, properties)


def _domain_banks(file: Path) -> tuple[Bank, ...]:
    from swtpm_prop.domain.metadata import parse_domain

    vtpm = parse_domain(read_file(file, DOMAIN_XML_BYTES))
    if vtpm is None:
        raise DomainError("domain.not-enabled", f"'{file}' has no metadata of ours", "use 'swtpm-prop domain enable'")
    return vtpm.banks


def _print_values(banks: tuple[Bank, ...], chosen: frozenset[int], state: str, as_json: bool) -> None:
    values = [(bank, sorted(chosen or bank.pcrs), _VALUES[state](bank).hex()) for bank in banks]
    for bank in banks:
        _check_translated(bank, chosen)
    if as_json:
        output.print_json([_json(bank, {"state": state, "pcrs": pcrs, "value": value}) for bank, pcrs, value in values])
    elif len(banks) == 1 and not values[0][1]:
        click.echo(values[0][2])
    else:
        rows = [(bank.algorithm.name, str(pcr), value) for bank, pcrs, value in values for pcr in pcrs]
        output.table(("Bank", "PCR", f"Value when {state}"), rows)


def _print_policies(
    banks: tuple[Bank, ...], chosen: frozenset[int], state: str, algorithm: HashAlgorithm, as_json: bool
) -> None:
    policies = []
    for bank in banks:
        _check_translated(bank, chosen)
        digest = policy_pcr(algorithm, bank.algorithm, dict.fromkeys(chosen, _VALUES[state](bank)))
        policies.append((bank, digest.hex()))
    if as_json:
        extra = {"state": state, "pcrs": sorted(chosen), "policyHash": algorithm.name}
        output.print_json([_json(bank, {**extra, "policy": digest}) for bank, digest in policies])
    elif len(policies) == 1:
        click.echo(policies[0][1])
    else:
        output.table(("Bank", "Policy"), [(bank.algorithm.name, digest) for bank, digest in policies])


def _check_translated(bank: Bank, chosen: frozenset[int]) -> None:
    missing = sorted(chosen - bank.pcrs)
    if missing:
        raise UsageError(
            "usage.pcrs",
            f"bank {bank.algorithm.name} of this domain does not translate PCR {missing[0]}",
            "choose among its PCRs, or add this one to the domain with swtpm-prop domain enable --pcrs",
        )


def _json(bank: Bank, more: dict[str, Any]) -> dict[str, Any]:
    return {"bank": bank.algorithm.name, "properties": list(bank.properties), **more}
