"""Policies computed without a TPM are those a TPM computes in trial sessions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hardware import HardwareTpm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_CC, TPM2_EO, TPM2_RH, TPM2_SE, TPM2_ST
from tpm2_pytss.types import (
    TPM2B_DIGEST,
    TPM2B_NAME,
    TPM2B_PUBLIC,
    TPML_DIGEST,
    TPML_PCR_SELECTION,
    TPMT_PUBLIC,
    TPMT_SYM_DEF,
    TPMT_TK_VERIFIED,
)

from swtpm_prop.custody import policy
from swtpm_prop.custody.hardware import Hardware


class Trial:
    """A trial session of a real TPM."""

    def __init__(self, tpm: Hardware) -> None:
        self.esys = tpm._tpm
        self.counter = self.esys.tr_from_tpmpublic(policy.COUNTER_HANDLE)
        none = TPMT_SYM_DEF(algorithm=TPM2_ALG.NULL)
        self.session = self.esys.start_auth_session(ESYS_TR.NONE, ESYS_TR.NONE, TPM2_SE.TRIAL, none, TPM2_ALG.SHA256)

    def restart(self) -> None:
        self.esys.policy_restart(self.session)

    def digest(self) -> bytes:
        return bytes(self.esys.policy_get_digest(self.session))

    def approved(self, pcrs: Mapping[int, bytes], epoch: int) -> bytes:
        self.restart()
        selection = TPML_PCR_SELECTION.parse("sha256:" + ",".join(map(str, pcrs)))
        self.esys.policy_pcr(self.session, policy.pcr_digest(pcrs), selection)
        operand = epoch.to_bytes(8, "big")
        self.esys.policy_nv(self.counter, self.counter, self.session, operand, TPM2_EO.UNSIGNED_LE, 0)
        return self.digest()

    def branch(self, name: bytes, property: str, command: TPM2_CC) -> bytes:
        self.restart()
        # A trial session takes no notice of the ticket.
        ticket = TPMT_TK_VERIFIED(tag=TPM2_ST.VERIFIED, hierarchy=TPM2_RH.OWNER)
        reference = policy.policy_ref(property)
        self.esys.policy_authorize(self.session, bytes(32), TPM2B_NAME(name), ticket, reference)
        self.esys.policy_command_code(self.session, command)
        return self.digest()

    def either(self, *branches: bytes) -> bytes:
        self.restart()
        self.esys.policy_or(self.session, TPML_DIGEST([TPM2B_DIGEST(branch) for branch in branches]))
        return self.digest()


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    with HardwareTpm(tmp_path_factory.mktemp("tpm")) as tpm, tpm.open() as opened:
        opened.initialise()
        trial = Trial(opened)
        yield trial
        trial.esys.flush_context(trial.session)


ONE_TPM = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
STATES = st.dictionaries(st.integers(0, 23), st.binary(min_size=32, max_size=32), min_size=1)
KEYS = st.integers(1, 2**200).map(lambda secret: ec.derive_private_key(secret, ec.SECP256R1()).public_key())


@ONE_TPM
@given(pcrs=STATES, epoch=st.integers(0, 2**64 - 1))
def test_an_approved_policy(trial: Trial, pcrs: Mapping[int, bytes], epoch: int) -> None:
    assert policy.approved(pcrs, epoch) == trial.approved(pcrs, epoch)


@ONE_TPM
@given(key=KEYS, property=st.text(max_size=100))
def test_the_policy_of_a_key(trial: Trial, key: ec.EllipticCurvePublicKey, property: str) -> None:
    public, _ = TPMT_PUBLIC.unmarshal(policy.authority_public(key))
    name = bytes(TPM2B_PUBLIC(publicArea=public).get_name())
    assert policy.authority_name(key) == name
    unseal, duplicate = (trial.branch(name, property, code) for code in (TPM2_CC.Unseal, TPM2_CC.Duplicate))
    assert policy.key_policy(name, property) == (trial.either(unseal, duplicate), (unseal, duplicate))


def test_the_name_of_the_counter(trial: Trial) -> None:
    assert bytes(trial.esys.tr_get_name(trial.counter)) == policy.COUNTER_NAME


def test_the_name_of_a_key_is_what_a_tpm_gives_it(trial: Trial) -> None:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    public, _ = TPMT_PUBLIC.unmarshal(policy.authority_public(key))
    loaded = trial.esys.load_external(TPM2B_PUBLIC(publicArea=public), hierarchy=ESYS_TR.OWNER)
    assert bytes(trial.esys.tr_get_name(loaded)) == policy.authority_name(key)
    trial.esys.flush_context(loaded)
