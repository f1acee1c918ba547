"""Makes the helpers beside this file importable in every test."""
