"""A decision at work: put in the place of a forward pass, and run step after step."""
