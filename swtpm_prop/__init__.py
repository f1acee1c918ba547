"""Virtual TPMs that record certified properties instead of raw digests, for libvirt and QEMU."""

__version__ = "0.1.0"
