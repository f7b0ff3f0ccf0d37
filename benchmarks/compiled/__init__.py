"""Compiled steps within budgets, beside PyTorch's own budgets: gradients, peaks and times."""
