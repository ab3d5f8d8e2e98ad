"""Where the tests find what lies outside the package."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
EXAMPLES = ROOT / "examples"
BENCHMARKS = EXAMPLES / "benchmarks"
DOCS = ROOT / "docs"
CURVES = DOCS / "benchmarks" / "curves"  # recorded searches
DATA = Path(
    os.environ.get("LIGHTNING_BGE_DATA", ROOT.parent / "shared" / "data")
)  # real data sets, where there are any
