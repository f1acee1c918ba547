"""The keys of guests, held by the host's own TPM."""
