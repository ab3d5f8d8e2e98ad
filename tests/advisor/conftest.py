"""The advisor is tried on the search's small search."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "hpo"))
