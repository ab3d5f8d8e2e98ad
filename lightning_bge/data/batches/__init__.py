"""Effective batches of token ids, cut into micro-batches."""
