"""Dynamic programming along a chain of blocks: rotor, rotor with menus, and revolve."""
