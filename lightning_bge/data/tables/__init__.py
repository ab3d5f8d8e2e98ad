"""Rows from files, their labels, and their folds."""
