"""Compare strategies on one step: same graph, same replay, same run."""
