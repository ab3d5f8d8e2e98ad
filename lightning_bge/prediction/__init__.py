"""Predictions of files of any size, written into files of several formats."""
