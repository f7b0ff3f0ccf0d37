"""From a model and a sample to a decision: capture the call, solve it, record it."""
