"""Every strategy on one step: same graph, same judge, same run."""
