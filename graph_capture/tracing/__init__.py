"""Run forward, loss and backward once on stand-ins: from a model to a traced step."""
