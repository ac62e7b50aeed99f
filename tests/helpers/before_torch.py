"""What must be said before torch is imported; the name puts it first among the imports of tests/conftest.py."""

from __future__ import annotations

import gc
import os

# Tests and the processes that they start compute the same bits, on one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# While modules are imported nothing becomes garbage, and to look for it takes a quarter of the time.
gc.disable()
