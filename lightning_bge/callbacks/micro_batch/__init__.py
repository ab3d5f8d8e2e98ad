"""The largest micro-batch that fits into memory and pays."""
