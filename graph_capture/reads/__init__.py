"""What forward reads and changes besides its tensors: objects of Python, settings, clocks."""
