"""Texts to token ids, once, in a cache on disk."""
