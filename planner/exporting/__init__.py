"""A plan as other tools can follow it: which layers to checkpoint, and what that loses."""
