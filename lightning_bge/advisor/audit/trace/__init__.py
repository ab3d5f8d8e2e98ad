"""A traced training step: what the profiler recorded of it, and what is read from that."""
