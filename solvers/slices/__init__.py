"""Slice refinement: the relaxation, its cuts, and the loop that closes the gap."""
