"""Run a comparison's strategies and peers on the device, alongside eager."""
