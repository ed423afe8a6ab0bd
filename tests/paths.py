"""Where tests find the clone and real data."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("TRIFOLD_DATA", ROOT.parent / "shared" / "data"))
