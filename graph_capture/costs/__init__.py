"""Estimate what a call costs: time by a roofline, scratch memory by rules."""
