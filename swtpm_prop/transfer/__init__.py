"""How a guest's key changes hosts in a live migration, so that exactly one of them can run the guest."""
