"""Console script `peft-svf`: one module for each command."""

from __future__ import annotations

from peft_svf.cli.main import main


__all__ = ["main"]
