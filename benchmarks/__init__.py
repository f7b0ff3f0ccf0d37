"""Solvers side by side, and how their time grows. No part of the wheel: run from the checkout."""
