"""A secret that a guest's owner seals to PCRs with stock tpm2-tools: the lines to run in the guest."""

from __future__ import annotations

from typing import NamedTuple

PCRS = "0,1,2,4,5,7,9,11"
"""All that OVMF and a unified kernel image measure into, but 3 and 6 (separators alone): tpm2-tools takes eight."""


class Seal(NamedTuple):
    """A secret sealed to ``pcrs`` of one bank and kept in the TPM at the persistent ``handle``."""

    bank: str
    handle: str
    pcrs: str = PCRS

    @property
    def selection(self) -> str:
        """The PCRs as tpm2-tools write them."""
        return f"{self.bank}:{self.pcrs}"

    @property
    def policy(self) -> str:
        """The file of the guest where ``lines`` leave the policy's digest."""
        return f"/run/{self.bank}.policy"

    def lines(self, secret: str) -> list[str]:
        """Seal the file ``secret`` of the guest to what its PCRs are now."""
        key, public, private, loaded = (f"/run/{self.bank}.{kind}" for kind in ("key", "pub", "priv", "loaded"))
        return [
            f"tpm2_createprimary -Q -C o -G ecc -c {key}",
            f"tpm2_createpolicy -Q --policy-pcr -l {self.selection} -L {self.policy}",
            f"tpm2_create -Q -C {key} -L {self.policy} -i {secret} -u {public} -r {private}",
            f"tpm2_load -Q -C {key} -u {public} -r {private} -c {loaded}",
            f"tpm2_evictcontrol -Q -C o -c {loaded} {self.handle}",
        ]

    @property
    def unseal(self) -> str:
        """Print the secret, or fail."""
        return f"tpm2_unseal -Q -c {self.handle} -p pcr:{self.selection}"
