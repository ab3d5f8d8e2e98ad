"""Attention over packed sequences, on every device."""
