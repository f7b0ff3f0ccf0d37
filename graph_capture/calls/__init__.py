"""What a call is by itself, a model's or an operator's: its tensors, writes, draws, processes."""
