"""The output folder of a training run: whether it may be written to, and what it is a run of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_svf.experts.files import replace_file


RUN_FILE = "run.json"
RESULTS_FILE = "results.json"


def check_output(output: Path, run: Mapping[str, Any], resume: bool) -> None:
    """
    Raise unless the run may use the folder.

    Args:
        output (`Path`): The folder; it may be missing or empty.
        run (`Mapping[str, Any]`): What is to be trained on what, in plain values: a run is resumed only as itself.
        resume (`bool`): Whether the user wants to go on with the run that is there, if any.

    Raises:
        ValueError: If the folder holds something else, or a run and `resume` is not set, or another run.
    """
    if not output.exists() or (output.is_dir() and {path.name for path in output.iterdir()} <= {RUN_FILE}):
        return  # also after a run that ended before its first checkpoint
    if not (output / RUN_FILE).is_file():
        raise ValueError(f"{output} exists and is no output of `peft-svf train`: choose another --output")
    if not resume:
        kind = "a finished run" if (output / RESULTS_FILE).is_file() else "an unfinished run"
        raise ValueError(f"{output} holds {kind}: add --resume to go on with it, or choose another --output")
    earlier = json.loads((output / RUN_FILE).read_text("utf-8"))
    if changed := [name for name, value in run.items() if earlier.get(name) != value]:
        name = changed[0]
        raise ValueError(
            f"{output} holds a run with another {name} ({earlier.get(name)!r}, not {run[name]!r}): resume it with the "
            "same arguments, or choose another --output"
        )


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file as a whole or not at all."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    replace_file(path, lambda partial: partial.write_text(text, "utf-8"))
