"""The command `python tests/faults`: see run.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path


# Before torch is imported: several processes with several threads each slow one another down tenfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["PEFT_SVF_CACHE"] = "off"
sys.path[0] = str(Path(__file__).resolve().parents[1])  # so that this folder is the package faults

from faults.run import main  # noqa: E402


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
