"""What all signed documents of this software are: in-toto Statements v1 in DSSE envelopes."""

PAYLOAD_TYPE = "application/vnd.in-toto+json"
"""Of the envelope (in-toto Attestation Framework, envelope.md)."""

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
"""Of the statement in it."""
