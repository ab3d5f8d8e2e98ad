"""A study read from its run folder: history, hours, importance."""
