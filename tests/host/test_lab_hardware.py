"""The TPM that a laboratory host has as its hardware: it must be what a machine with firmware and kernel has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from product import at

from lab.hardware import EVENT_LOG, TCTI, HardwareTpm, Maker, boot_of
from lab.host import Host, laboratory
from swtpm_prop.tpm import eventlog
from swtpm_prop.tpm.algorithms import SHA256

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def tpm() -> Iterator[HardwareTpm]:
    with laboratory("hardware") as (work, (host,)):
        yield HardwareTpm(host, Maker(work))


def tool(host: Host, name: str, *words: str) -> str:
    return host.run([f"tpm2_{name}", "-T", TCTI, *words]).stdout


def pcrs(tpm: HardwareTpm) -> dict[int, bytes]:
    tool(tpm.host, "pcrread", "sha256:0,1,2,3,4,5,6,7", "-o", "/run/pcrs")
    values = (tpm.host.root / "run/pcrs").read_bytes()
    return {pcr: values[32 * pcr : 32 * pcr + 32] for pcr in range(8)}


def test_the_event_log_says_what_the_registers_hold(tpm: HardwareTpm):
    tpm.boot()
    log = eventlog.parse(at(tpm.host, EVENT_LOG).read_bytes())
    assert eventlog.replay(log, SHA256) == pcrs(tpm)
    stock = pcrs(tpm)
    tpm.extend(4, b"more")
    assert {pcr for pcr in range(8) if pcrs(tpm)[pcr] != stock[pcr]} == {4}
    tpm.boot(boot_of("another kernel"))
    assert {pcr for pcr in range(8) if pcrs(tpm)[pcr] != stock[pcr]} == {4}
    tpm.boot()
    assert pcrs(tpm) == stock


def test_what_is_persistent_outlives_a_loss_of_power(tpm: HardwareTpm):
    tpm.boot()
    tool(tpm.host, "createprimary", "-Q", "-C", "o", "-c", "/run/primary")
    tool(tpm.host, "evictcontrol", "-Q", "-C", "o", "-c", "/run/primary", "0x81005350")
    tpm.boot()
    assert "0x81005350" in tool(tpm.host, "getcap", "handles-persistent")


def test_its_certificate_leads_to_the_maker(tpm: HardwareTpm):
    tpm.boot()
    tool(tpm.host, "getekcertificate", "-o", "/run/ek.der")
    tpm.host.put("/run/roots.pem", tpm.maker.roots.read_text())
    tpm.host.run(["openssl", "x509", "-inform", "DER", "-in", "/run/ek.der", "-out", "/run/ek.pem"])
    # RFC 5280 has no word for the critical extension that the TCG puts into them
    words = ["-ignore_critical", "-CAfile", "/run/roots.pem", "/run/ek.pem"]
    assert tpm.host.run(["openssl", "verify", *words]).stdout == "/run/ek.pem: OK\n"


def test_nothing_stays_of_a_client_that_was_killed(tpm: HardwareTpm):
    tpm.boot()
    for _ in range(4):  # a TPM holds three
        tool(tpm.host, "createprimary", "-Q", "-C", "o", "-c", "/run/primary")
        tool(tpm.host, "startauthsession", "--policy-session", "-S", "/run/session")
    assert tool(tpm.host, "getcap", "handles-transient") == ""
    assert tool(tpm.host, "getcap", "handles-saved-session") == ""
