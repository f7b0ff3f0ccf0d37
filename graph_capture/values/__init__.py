"""Values of tensors that code asks for while it runs on stand-ins, and what they depend on."""
