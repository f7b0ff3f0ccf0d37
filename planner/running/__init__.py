"""Run a plan: put it in place of a forward pass, and execute it step by step."""
