"""These tests need the plugin `tests.simulated_cuda.plugin`; `tests/test_simulated_cuda.py` runs them with it."""

import sys

collect_ignore_glob = [] if "tests.simulated_cuda.plugin" in sys.modules else ["test_*.py"]
