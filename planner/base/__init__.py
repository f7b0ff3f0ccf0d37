"""What every room of the planner may use: budgets, calls, a training step, progress, files."""
