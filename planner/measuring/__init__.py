"""Real steps on the device: peaks, times, bits, and a plan's predictions beside them."""
