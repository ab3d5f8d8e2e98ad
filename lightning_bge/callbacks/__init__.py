"""Callbacks for any Lightning project: none of them needs our module or data module."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
