"""`peft-svf transfer`: an expert of one base model on another, with a report before anything is written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_svf.cli.argument_types import DTYPES, DefaultsFormatter


if TYPE_CHECKING:
    from peft_svf.experts.transfer import Transfer

CONTROLS = ("shuffled", "reversed", "random")


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `peft-svf transfer`."""
    parser = commands.add_parser(
        "transfer",
        help="use an expert on another base model, after a report of what fits",
        description="Put the offsets of an expert onto another base model: module by module role and relative depth, "
        "in the order of singular values. Whether that helps is an open question for every pair of models: evaluate "
        "it beside a control. `peft-svf adapt --model MODEL --adapter ONE --adapter OTHER --task TASK` then mixes "
        "transferred experts by a few examples.",
        formatter_class=DefaultsFormatter,
    )
    add = parser.add_argument
    add("--from", dest="source", required=True, metavar="EXPERT", help="the expert: a folder or an id on the Hub")
    add("--from-revision", "--from_revision", metavar="REVISION", help="revision of the expert on the Hub")
    add("--to", dest="target", required=True, metavar="MODEL", help="the other base model: a folder or an id")
    add("--to-revision", "--to_revision", metavar="REVISION", help="revision of the other base model on the Hub")
    add("--output", type=Path, metavar="FOLDER", help="where the expert for the other model is written")
    add(
        "--from-model",
        "--from_model",
        metavar="MODEL",
        help="the expert's own base model: the report then has distances between the spectra of both models",
    )
    add("--control", choices=CONTROLS, help="a transfer to compare with: offsets in another order, or random ones")
    add("--seed", type=int, default=0, help="seed of the controls shuffled and random")
    add("--report", type=Path, metavar="FILE", help="write the report as JSON, too")
    add("--dry-run", "--dry_run", action="store_true", help="only the report")
    add("--dtype", choices=DTYPES, default="auto", help="of the models; the expert then fits that dtype exactly")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """
    Report, then write.

    Raises:
        ValueError: For arguments that cannot work; nothing was loaded.
        ExpertError: If the expert cannot be read, or nothing of it fits; nothing was written.
    """
    from peft_svf.cli.models import BaseModel, check_adapter
    from peft_svf.experts.expert import Expert
    from peft_svf.experts.transfer import transfer

    check_arguments(arguments)
    check_adapter(arguments.source)
    models = {
        "target": BaseModel(arguments.target, arguments.to_revision, arguments.dtype),
        "source": BaseModel(arguments.from_model, None, arguments.dtype) if arguments.from_model else None,
    }
    expert = Expert.from_pretrained(arguments.source, revision=arguments.from_revision)
    loaded = {name: None if model is None else _loaded(model) for name, model in models.items()}
    made = transfer(
        expert,
        loaded["target"],
        control=arguments.control,
        seed=arguments.seed,
        source_model=loaded["source"],
    )
    print(f"From {arguments.source} to {arguments.target}" + _of_control(arguments) + "\n")
    print(made.report.to_text())
    if arguments.report is not None:
        from peft_svf.cli.run_folder import write_json

        write_json(arguments.report, {"from": arguments.source, "to": arguments.target, **made.report.to_dict()})
    if arguments.dry_run:
        print("\nNothing was written: --dry-run")
        return
    write(made, arguments.output)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise a `ValueError` for what can be known to be wrong at once."""
    from peft_svf.cli.output_files import check_output_file

    if arguments.report is not None:
        check_output_file(arguments.report, "--report", (".json",))
    if arguments.dry_run:
        return
    output: Path | None = arguments.output
    if output is None:
        raise ValueError("--output is missing: where to write the expert; --dry-run only reports")
    check_output_file(output / "adapter_config.json", "--output")
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not _is_expert(output)):
        raise ValueError(f"--output {output} exists and is no expert: choose another folder")
    if Path(arguments.source).is_dir() and output.resolve() == Path(arguments.source).resolve():
        raise ValueError(f"--output {output} is the expert that is transferred: choose another folder")


def write(made: Transfer, output: Path) -> None:
    """The expert and its card."""
    from peft_svf.hub_cards import write_expert_card

    made.expert.save_pretrained(output)
    write_expert_card(output)
    count = sum(offset.numel() for offset in made.expert.offsets.values())
    print(
        f"\nThe expert, {count} offsets, is in {output}: peft-svf evaluate --model ... --adapter {output} --task ..."
    )


def _is_expert(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() and (folder / "adapter_model.safetensors").is_file()


def _loaded(model: Any) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading weights
    model.check()
    return model.load()


def _of_control(arguments: argparse.Namespace) -> str:
    seed = "" if arguments.control in (None, "reversed") else f", seed {arguments.seed}"
    return f" (control: {arguments.control}{seed})" if arguments.control else ""
