"""What is wrong on a host and how to mend it: small independent checks, each a function from the host to findings."""
