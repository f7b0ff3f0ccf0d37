"""One plan inside each block of a model: which one where, solved exactly for the whole step."""
