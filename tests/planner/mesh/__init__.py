"""Steps on a mesh of devices, before any of them is there."""
