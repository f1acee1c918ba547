"""Put the product into a host's libvirt and take exactly that out again: a pure plan and a thin executor."""
