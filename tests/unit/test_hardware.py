"""The host's TPM against a real one: who opens a key, in which state, and what never opens it."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hardware import HardwareTpm, manufacture
from tpm2_pytss.constants import TPM2_SE
from tpm2_pytss.types import TPM2B_PUBLIC, TPM2B_SENSITIVE_CREATE, TPMS_SENSITIVE_CREATE, TPMT_PUBLIC

from swtpm_prop.custody import hardware, policy
from swtpm_prop.custody.hardware import PARENT_HANDLE, Hardware
from swtpm_prop.custody.objects import Sealed
from swtpm_prop.custody.policy import Approval, Authorization, approved, authority_name, key_policy, to_sign
from swtpm_prop.errors import HostError
from swtpm_prop.limits import EPOCH_STEPS
from swtpm_prop.trust import keys

pytestmark = pytest.mark.root

APPROVED = "https://example.org/properties/approved-host"
OTHER = "https://example.org/properties/other-host"
KEY = bytes(range(100, 132))
AUTHORITY = ec.derive_private_key(0x5EED, ec.SECP256R1())
STRANGER = ec.derive_private_key(0xBAD, ec.SECP256R1())
POLICY = key_policy(authority_name(AUTHORITY.public_key()), APPROVED).digest
STATE = range(8)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[HardwareTpm]:
    """An initialised host."""
    with HardwareTpm(tmp_path / "host") as tpm:
        with tpm.open() as opened:
            opened.initialise()
        yield tpm


@pytest.fixture
def other(tmp_path: Path) -> Iterator[HardwareTpm]:
    """Another one."""
    with HardwareTpm(tmp_path / "other") as tpm:
        with tpm.open() as opened:
            opened.initialise()
        yield tpm


def approval(
    pcrs: Mapping[int, bytes], epoch: int = 1, key: ec.EllipticCurvePrivateKey = AUTHORITY, property: str = APPROVED
) -> Approval:
    signature = keys.sign(key, to_sign(approved(pcrs, epoch), property))
    return Approval("reference", property, pcrs, epoch, signature)


def authorization(opened: Hardware, epoch: int = 1) -> Authorization:
    """What the authority says of the state this host is in."""
    return Authorization(AUTHORITY.public_key(), APPROVED, approval(opened.pcrs(STATE), epoch))


@contextmanager
def refused(id: str) -> Iterator[None]:
    with pytest.raises(HostError) as error:
        yield
    assert error.value.id == id, error.value


def test_a_key_opens_in_an_approved_state(host: HardwareTpm) -> None:
    with host.open() as opened:
        sealed = opened.seal(KEY, POLICY)
        assert opened.unseal(sealed, authorization(opened)) == KEY
    host.reboot()
    with host.open() as opened:
        assert opened.unseal(sealed, authorization(opened)) == KEY
        with refused("tpm.policy-denied"):
            opened.unseal(sealed)


def test_an_update_takes_a_signature_and_no_sealing(host: HardwareTpm) -> None:
    with host.open() as opened:
        sealed = opened.seal(KEY, POLICY)
    host.reboot().extend(4)
    with host.open() as opened:
        assert opened.unseal(sealed, authorization(opened)) == KEY


def test_a_state_that_is_not_approved_opens_nothing(host: HardwareTpm) -> None:
    with host.open() as opened:
        sealed, before = opened.seal(KEY, POLICY), authorization(opened)
    host.extend(7)
    with host.open() as opened:
        with refused("tpm.state-not-approved"):
            opened.unseal(sealed, before)
        with refused("tpm.state-not-approved"):
            opened.duplicate(sealed, before, opened.parent_public)


def test_a_revoked_approval_opens_nothing(host: HardwareTpm) -> None:
    with host.open() as opened:
        sealed, before = opened.seal(KEY, POLICY), authorization(opened)
        opened.raise_epoch(2)
        assert opened.epoch() == 2
        with refused("tpm.approval-revoked"):
            opened.unseal(sealed, before)
        with refused("tpm.approval-revoked"):
            opened.duplicate(sealed, before, opened.parent_public)
        assert opened.unseal(sealed, authorization(opened, epoch=2)) == KEY
    host.reboot()
    with host.open() as opened, refused("tpm.approval-revoked"):
        opened.unseal(sealed, before)


def command(code: int, *parts: int | bytes, handle: int | None = None, auth: int) -> bytes:
    """A command with an empty password for ``auth``, by hand."""
    body = struct.pack(">I", auth) + (struct.pack(">I", handle) if handle is not None else b"")
    body += bytes.fromhex("00000009 40000009 0000 00 0000")
    body += b"".join(part if isinstance(part, bytes) else struct.pack(">I", part) for part in parts)
    return struct.pack(">HII", 0x8002, 10 + len(body), code) + body


OWNER, LOCKOUT = 0x40000001, 0x4000000A
UNDEFINE, CLEAR, DEFINE, INCREMENT = 0x122, 0x126, 0x12A, 0x134


def test_to_delete_and_define_the_counter_anew_does_not_help(host: HardwareTpm) -> None:
    with host.open() as opened:
        sealed, before = opened.seal(KEY, POLICY), authorization(opened)
        opened.raise_epoch(5)
    public = policy.counter_public(written=False)
    define = struct.pack(">HH", 0, len(public)) + public
    assert host.send(command(UNDEFINE, auth=OWNER, handle=policy.COUNTER_HANDLE))[6:10] == bytes(4)
    with host.open() as opened, refused("tpm.not-initialised"):
        opened.unseal(sealed, before)
    assert host.send(command(DEFINE, define, auth=OWNER))[6:10] == bytes(4)
    # A counter that never counted has another Name, and no value to compare.
    with host.open() as opened, refused("tpm.not-initialised"):
        opened.unseal(sealed, before)
    host.reboot()
    index = policy.COUNTER_HANDLE
    assert host.send(command(INCREMENT, auth=index, handle=index))[6:10] == bytes(4)
    with host.open() as opened:
        assert opened.epoch() == 6
        with refused("tpm.approval-revoked"):
            opened.unseal(sealed, before)


def test_to_define_something_else_in_the_counter_s_place_does_not_help(host: HardwareTpm) -> None:
    with host.open() as opened:
        sealed, before = opened.seal(KEY, POLICY), authorization(opened)
        opened.raise_epoch(2)
    assert host.send(command(UNDEFINE, auth=OWNER, handle=policy.COUNTER_HANDLE))[6:10] == bytes(4)
    # An ordinary index of the same size, which the owner writes an early epoch to.
    public = struct.pack(">IHIHH", policy.COUNTER_HANDLE, 0x000B, 0x02060006, 0, 8)
    assert host.send(command(DEFINE, struct.pack(">HH", 0, 14) + public, auth=OWNER))[6:10] == bytes(4)
    written = struct.pack(">H", 8) + policy.epoch_operand(1) + bytes(2)
    assert host.send(command(0x137, written, auth=OWNER, handle=policy.COUNTER_HANDLE))[6:10] == bytes(4)
    with host.open() as opened:
        with refused("tpm.policy-denied"):
            opened.unseal(sealed, before)
        with refused("tpm.handle-taken"):
            opened.initialise()


def test_to_clear_the_tpm_does_not_help(host: HardwareTpm, tmp_path: Path) -> None:
    with host.open() as opened:
        sealed, before = opened.seal(KEY, POLICY), authorization(opened)
        opened.raise_epoch(5)
    assert host.send(command(CLEAR, auth=LOCKOUT))[6:10] == bytes(4)
    with host.open() as opened, refused("tpm.cleared"):
        opened.initialise()
    host.keys.rename(tmp_path / "away")
    with host.open() as opened:
        opened.initialise()
        assert opened.epoch() == 6
        # Not even who approves this epoch opens it: the seed of the storage hierarchy is another.
        with refused("tpm.foreign-object"):
            opened.unseal(sealed, authorization(opened, epoch=6))
        with refused("tpm.approval-revoked"):
            opened.unseal(sealed, before)


def test_a_tpm_that_counted_before_starts_above_it(tmp_path: Path) -> None:
    with HardwareTpm(tmp_path) as tpm:
        public = struct.pack(">IHIHH", 0x01800001, 0x000B, 0x02060014, 0, 8)
        assert tpm.send(command(DEFINE, struct.pack(">HH", 0, 14) + public, auth=OWNER))[6:10] == bytes(4)
        for _ in range(3):
            assert tpm.send(command(INCREMENT, auth=0x01800001, handle=0x01800001))[6:10] == bytes(4)
        assert tpm.send(command(UNDEFINE, auth=OWNER, handle=0x01800001))[6:10] == bytes(4)
        with tpm.open() as opened:
            opened.initialise()
            assert opened.epoch() == 4


def test_the_counter_is_raised_in_reasonable_steps(host: HardwareTpm) -> None:
    with host.open() as opened:
        opened.raise_epoch(0)
        assert opened.epoch() == 1
        with refused("tpm.epoch-far"):
            opened.raise_epoch(EPOCH_STEPS + 2)
        assert opened.epoch() == 1


@pytest.mark.parametrize(
    ("said", "id"),
    [
        (lambda pcrs: (STRANGER, APPROVED, approval(pcrs, key=STRANGER)), "tpm.policy-denied"),
        (lambda pcrs: (AUTHORITY, APPROVED, approval(pcrs, key=STRANGER)), "tpm.approval-signature"),
        (lambda pcrs: (AUTHORITY, OTHER, approval(pcrs, property=OTHER)), "tpm.policy-denied"),
        (lambda pcrs: (AUTHORITY, APPROVED, approval(pcrs, property=OTHER)), "tpm.approval-signature"),
        (lambda pcrs: (AUTHORITY, APPROVED, approval(pcrs, epoch=1)._replace(epoch=2)), "tpm.approval-signature"),
    ],
    ids=["authority", "signature", "property", "property-of-approval", "epoch-of-approval"],
)
def test_another_s_word_opens_nothing(host: HardwareTpm, said: object, id: str) -> None:
    assert callable(said)
    with host.open() as opened:
        sealed = opened.seal(KEY, POLICY)
        authority, property, word = said(opened.pcrs(STATE))
        with refused(id):
            opened.unseal(sealed, Authorization(authority.public_key(), property, word))


def test_a_key_s_object_is_worth_nothing_in_another_tpm(host: HardwareTpm, other: HardwareTpm) -> None:
    with host.open() as opened:
        sealed, said = opened.seal(KEY, POLICY), authorization(opened)
    with other.open() as opened:
        assert opened.pcrs(STATE) == said.approval.pcrs
        with refused("tpm.foreign-object"):
            opened.unseal(sealed, said)


def test_a_changed_object_opens_nothing(host: HardwareTpm) -> None:
    with host.open() as opened:
        sealed, said = opened.seal(KEY, POLICY), authorization(opened)
        # Its policy taken away, userWithAuth set: who holds the file would like that.
        assert sealed.public.count(POLICY) == 1
        public = sealed.public.replace(POLICY, bytes(32))
        for changed in (Sealed(public, sealed.private), Sealed(sealed.public, sealed.private[:-1] + b"\0")):
            with refused("tpm.foreign-object"):
                opened.unseal(changed, said)


def test_a_key_leaves_for_one_tpm_alone(host: HardwareTpm, other: HardwareTpm, tmp_path: Path) -> None:
    with other.open() as opened:
        parent = opened.parent_public
    with host.open() as opened:
        said = authorization(opened)
        blob = opened.duplicate(opened.seal(KEY, POLICY), said, parent)
        assert KEY not in b"".join(blob)
        with refused("tpm.foreign-object"):
            opened.import_(blob)
    with HardwareTpm(tmp_path / "third") as third, third.open() as opened:
        opened.initialise()
        with refused("tpm.foreign-object"):
            opened.import_(blob)
    with other.open() as opened:
        own = opened.import_(blob, POLICY)
        assert opened.unseal(own, said) == KEY
        with refused("tpm.import-policy"):
            opened.import_(blob, bytes(32))
    other.extend(0)
    with other.open() as opened, refused("tpm.state-not-approved"):
        opened.unseal(own, said)


def test_no_key_comes_that_opens_without_its_policy(host: HardwareTpm, other: HardwareTpm) -> None:
    with other.open() as opened:
        parent = opened.parent_public
    with host.open() as opened:
        said = authorization(opened)
        template = TPM2B_PUBLIC(publicArea=TPMT_PUBLIC.parse("keyedhash", objectAttributes="noda|userwithauth"))
        template.publicArea.authPolicy = POLICY
        sensitive = TPM2B_SENSITIVE_CREATE(TPMS_SENSITIVE_CREATE(data=KEY))
        private, public, *_ = opened._tpm.create(opened._parent, sensitive, template)
        blob = opened.duplicate(Sealed(public.marshal(), private.marshal()), said, parent)
    with other.open() as opened:
        with refused("tpm.import-attributes"):
            opened.import_(blob, POLICY)
        # this is what it would have been good for
        assert opened.unseal(opened.import_(blob)) == KEY


def test_what_belongs_to_the_host_never_leaves_it(host: HardwareTpm, other: HardwareTpm) -> None:
    with other.open() as opened:
        parent = opened.parent_public
    with host.open() as opened:
        sealed = opened.seal(bytes(hardware.SECRET_BYTES))
        assert opened.unseal(sealed) == bytes(hardware.SECRET_BYTES)
        with refused("tpm.policy-denied"):
            opened.duplicate(sealed, authorization(opened), parent)


def test_a_handle_that_is_lost_comes_back(host: HardwareTpm) -> None:
    with host.open() as opened:
        sealed, parent, said = opened.seal(KEY, POLICY), opened.parent_public, authorization(opened)
        attestation_key = opened.ak_public
    evict = command(0x120, PARENT_HANDLE, auth=OWNER, handle=PARENT_HANDLE)
    assert host.send(evict)[6:10] == bytes(4)
    with host.open() as opened:
        with refused("tpm.not-initialised"):
            opened.unseal(sealed, said)
        opened.initialise()
        assert (opened.parent_public, opened.ak_public) == (parent, attestation_key)
        assert opened.unseal(sealed, said) == KEY


def test_a_process_that_was_killed_fills_no_tpm(host: HardwareTpm) -> None:
    with host.open() as opened:
        sealed, said = opened.seal(KEY, POLICY), authorization(opened)
    child = os.fork()
    if child == 0:
        stack = ExitStack()
        dying = stack.enter_context(host.open())
        # As much as there is room for beside the parent: no resource manager takes it away.
        for _ in range(2):
            stack.enter_context(dying._session(TPM2_SE.POLICY))
            stack.enter_context(dying._loaded(sealed))
        os._exit(17)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
    with host.open() as opened:
        assert opened.unseal(sealed, said) == KEY


def test_one_process_at_a_time(host: HardwareTpm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "TPM_LOCK_SECONDS", 0.05)
    with host.open() as opened:
        with refused("tpm.busy"), host.open():
            pass
        assert opened.epoch() == 1


def test_a_host_without_keys_says_so(tmp_path: Path) -> None:
    with HardwareTpm(tmp_path) as tpm, tpm.open() as opened:
        for ask in (opened.epoch, lambda: opened.seal(KEY), lambda: opened.quote(STATE, b""), lambda: opened.ak_public):
            with refused("tpm.not-initialised"):
                ask()


def test_a_tpm_that_is_not_there(host: HardwareTpm, capfd: pytest.CaptureFixture[str]) -> None:
    host.stop()
    for tcti in (host.tcti, "device:/nonexistent", "nonsense", "device:/dev/null"):
        with refused("tpm.unreachable"), Hardware(tcti, host.lock):
            pass
    assert capfd.readouterr() == ("", "")


def test_a_host_with_an_owner_password_says_so(tmp_path: Path) -> None:
    with HardwareTpm(tmp_path) as tpm:
        assert tpm.send(command(0x129, b"\0\x03abc", auth=OWNER))[6:10] == bytes(4)
        with tpm.open() as opened, refused("tpm.owner-password"):
            opened.initialise()


def test_a_tpm_without_its_sha256_bank_says_so(tmp_path: Path) -> None:
    tpm = HardwareTpm(tmp_path / "tpm")
    manufacture(tpm, tmp_path / "manufacturer", banks="sha384")
    with tpm, tpm.open() as opened, refused("tpm.no-sha256-bank"):
        opened.pcrs(STATE)


def test_the_manufacturer_s_certificate_is_of_the_endorsement_key(tmp_path: Path) -> None:
    tpm = HardwareTpm(tmp_path / "tpm")
    roots = x509.load_pem_x509_certificates(manufacture(tpm, tmp_path / "manufacturer").read_bytes())
    with tpm, tpm.open() as opened:
        opened.initialise()
        certificate = x509.load_der_x509_certificate(opened.ek_certificate() or b"")
        key = certificate.public_key()
        assert isinstance(key, rsa.RSAPublicKey)
        assert opened.ek_public.endswith(key.public_numbers().n.to_bytes(256, "big"))
        certificate.verify_directly_issued_by(roots[0])
