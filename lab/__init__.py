"""The laboratory: libvirt hosts and guests of our own on one machine, for tests, benchmarks and the demonstration."""
