"""Verdicts on a step of a planned loop."""

FINE = ("equal", "said and equal", "said, other last bits", "error said", "eager's error")
"""Verdicts that keep the promise."""
BROKEN = ("other bits", "silent", "crash", "no error", "another error")
"""Verdicts that do not."""
