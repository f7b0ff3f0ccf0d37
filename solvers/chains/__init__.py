"""Dynamic programming along a chain of blocks: rotor and revolve."""
