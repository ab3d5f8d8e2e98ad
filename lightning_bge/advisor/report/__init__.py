"""A run as a page, and its status as text."""
