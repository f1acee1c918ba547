"""What libvirt's qemu hook does: one guest's operations turned into steps on the host."""
