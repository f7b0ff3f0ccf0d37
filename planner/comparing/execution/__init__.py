"""The strategies and peers of a comparison, run on the device beside eager."""
