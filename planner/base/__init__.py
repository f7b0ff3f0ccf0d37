"""What every part of the planner may use: budgets, calls, a training step, progress, files."""
