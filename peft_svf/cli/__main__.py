"""`python -m peft_svf.cli`, for launchers: `accelerate launch -m peft_svf.cli train ...`."""

from __future__ import annotations

import sys

from peft_svf.cli.main import main


if __name__ == "__main__":
    sys.exit(main())
