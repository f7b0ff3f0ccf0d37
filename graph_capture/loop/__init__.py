"""What the training loop does and holds beside the model: loss, optimizer, gradients."""
