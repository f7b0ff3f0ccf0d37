"""The tables of record: every strategy and peer on the models of the literature."""
