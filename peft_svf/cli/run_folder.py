"""The output folder of a training run: whether it may be written to, what it is a run of, and how files get there."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from peft_svf.experts.files import make_readable


RUN_FILE = "run.json"
RESULTS_FILE = "results.json"
STAGING = ".expert.partial"
LEFT_OUT = ("training_args.bin",)  # a pickle; what it says stands in results.json
LAST = ("adapter_config.json", "adapter_model.safetensors")


def check_output(output: Path, run: Mapping[str, Any], resume: bool) -> str | None:
    """
    The checkpoint to go on from, None to start anew.

    Args:
        output (`Path`): The folder; it may be missing or empty.
        run (`Mapping[str, Any]`): What is to be trained on what, in plain values: a run is resumed only as itself.
        resume (`bool`): Whether the user wants to go on from the last checkpoint there, if any.

    Raises:
        ValueError: If the folder holds something else, or a run and `resume` is not set, or another run.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
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
    return get_last_checkpoint(str(output))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        staged.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def save_expert(trainer: Any, output: Path) -> None:
    """Write the trained adapter with tokenizer and card into `output`, the weights last. Every process calls this."""
    staging = output / STAGING
    trainer.save_model(str(staging), _internal_call=True)  # no push of a half-written folder
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        make_readable(staging)
        files = [path for path in staging.iterdir() if path.name not in LEFT_OUT]
        for path in sorted(files, key=lambda path: LAST.index(path.name) if path.name in LAST else -1):
            os.replace(path, output / path.name)
        shutil.rmtree(staging)
    trainer.accelerator.wait_for_everyone()
