"""torch.compile for an encoder's layers, where it pays."""
