"""Which trials are paused or pruned, and when."""
