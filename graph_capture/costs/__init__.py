"""What a call costs: time by a roofline, scratch memory by rule."""
