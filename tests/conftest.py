"""Set before torch is imported, as in search.py: a busy machine is not to slow the tests down."""
import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
