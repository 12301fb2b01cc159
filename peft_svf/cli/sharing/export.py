"""`peft-svf export`: an expert, or a mixture, as a merged checkpoint, a LoRA, or a folder for mergekit."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_svf.cli.argument_types import DTYPES, mixture, positive, share


if TYPE_CHECKING:
    import torch

    from peft_svf.experts import ExpertBank
    from peft_svf.experts.merged_export import MergeError

METHODS = ("task_arithmetic", "linear", "ties", "dare_linear", "dare_ties")  # of mergekit.MergeMethod
EPILOG = """\
merged   W' = U S diag(z) V^T in the weights of an ordinary checkpoint, exact up to the rounding of its dtype
lora     the best LoRA of the rank; an expert has full rank, so read the error that is printed
mergekit a folder for each expert (merged, or a LoRA with --rank) and mergekit.yaml, to run in the folder

GGUF, for llama.cpp and Ollama: export merged, then llama.cpp's own converter (not run in this project):
  python llama.cpp/convert_hf_to_gguf.py FOLDER --outfile expert.gguf --outtype bf16

examples:
  peft-svf export --expert math --to merged --output served-math
  peft-svf export --model BASE --adapter my-expert --to lora --rank 64 --output my-lora
  peft-svf export --model BANK --mix math=0.7,code=0.3 --to merged --output both
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `peft-svf export`."""
    parser = commands.add_parser(
        "export",
        help="write an expert as a merged checkpoint, a LoRA, or for mergekit",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--to", choices=("merged", "lora", "mergekit"), required=True, help="what to write, see below")
    add("--output", type=Path, required=True, metavar="FOLDER", help="new or empty folder")
    add("--model", metavar="BANK|BASE", help="a bank or a base model: a folder or an id on the Hub (the playground's)")
    add(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]EXPERT",
        help="expert to add: a folder or an id on the Hub (may be repeated)",
    )
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--expert", metavar="NAME", help="which expert (the only one; for mergekit all)")
    who.add_argument("--mix", type=mixture, metavar="NAME=WEIGHT,...", help="mixture, like math=0.7,code=0.3")
    rank = parser.add_mutually_exclusive_group()
    rank.add_argument("--rank", type=positive, help="rank of the LoRA")
    rank.add_argument(
        "--keep-energy", "--keep_energy", type=share, metavar="SHARE", help="smallest ranks that keep it, e.g. 0.9"
    )
    add("--dtype", choices=DTYPES, default="auto", help="of the merged weights (auto: the base model's)")
    add("--fast", action="store_true", help="merge with the model's own singular bases; measures no error")
    add("--merge-method", "--merge_method", choices=METHODS, default=METHODS[0], help="of mergekit (%(default)s)")
    add("--density", type=share, help="share of the changes that ties and dare keep")
    add("--include-base", "--include_base", action="store_true", help="mergekit: copy the base model into the folder")
    add("--revision", help="revision of the bank or base model on the Hub")
    add("--device-map", "--device_map", help="spread the model over devices, e.g. auto")
    add("--use-cpu", "--use_cpu", action="store_true", help="do not use an accelerator")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """
    Load the bank or base model, export, and print what was written, its error and how to use it.

    Raises:
        ValueError: For arguments that cannot work, where possible before a model is loaded.
        ExpertError: If the model cannot be loaded or exported.
    """
    from accelerate import PartialState

    from peft_svf.cli.banks import load_bank
    from peft_svf.experts.merged_export import check_empty

    _check(arguments)
    check_empty(arguments.output.absolute())
    state = PartialState(cpu=arguments.use_cpu)
    if not state.is_main_process:
        return
    loading = argparse.Namespace(**{**vars(arguments), "dtype": "auto"})  # --dtype is that of what is written
    bank = load_bank(loading, state)
    {"merged": _merged, "lora": _lora, "mergekit": _mergekit}[arguments.to](bank, arguments)


def _check(arguments: argparse.Namespace) -> None:
    has_rank = arguments.rank is not None or arguments.keep_energy is not None
    if arguments.to == "lora" and not has_rank:
        raise ValueError("--to lora needs --rank N, or --keep-energy SHARE for the smallest ranks that keep it")
    if arguments.to == "merged" and has_rank:
        raise ValueError("--rank and --keep-energy are for LoRAs: a merged checkpoint has the expert's full rank")
    if arguments.keep_energy == 0:
        raise ValueError("--keep-energy is a share above 0")
    if arguments.to == "lora" and (arguments.dtype != "auto" or arguments.fast):
        raise ValueError("--dtype and --fast are for merged weights: a LoRA is written in float32, with its error")
    if arguments.to != "mergekit" and (
        arguments.density is not None or arguments.include_base or arguments.merge_method != METHODS[0]
    ):
        raise ValueError("--merge-method, --density and --include-base are for --to mergekit")


def _chosen(bank: ExpertBank, arguments: argparse.Namespace) -> str | dict[str, float]:
    if arguments.mix is not None:
        return arguments.mix
    if arguments.expert is not None:
        return bank.check_expert(arguments.expert)
    if not bank.experts:
        raise ValueError("this is a base model without experts: add one, --adapter EXPERT")
    if len(bank.experts) > 1:
        raise ValueError(f"which expert? --expert NAME, or --mix: the bank has {', '.join(bank.experts)}")
    return next(iter(bank.experts))


def _merged(bank: ExpertBank, arguments: argparse.Namespace) -> None:
    from peft_svf.experts.merged_export import save_merged
    from peft_svf.experts.serve_commands import merged_commands

    chosen = _chosen(bank, arguments)
    made = save_merged(bank, arguments.output, chosen, dtype=_dtype(arguments), exact=not arguments.fast)
    kind = str(made.dtype).removeprefix("torch.")
    print(f"{_what(chosen)} as a merged checkpoint in {arguments.output}: {_size(made.size)}, {kind}")
    print(f"  {_merge_error(made.error)}")
    print("Serve it:", *merged_commands(arguments.output), sep="\n  ")


def _lora(bank: ExpertBank, arguments: argparse.Namespace) -> None:
    from peft_svf.experts import ExpertError, save_as_lora
    from peft_svf.experts.serve_commands import lora_command

    chosen = _chosen(bank, arguments)
    model: Any = bank.model
    name = chosen
    if isinstance(chosen, dict):
        name = "-".join(chosen) + "-mixture"
        model.add_weighted_adapter(list(chosen), list(chosen.values()), name)
    elif chosen not in bank.experts:
        raise ExpertError("This is the base model itself, which needs no export: use its own checkpoint.")
    error = save_as_lora(arguments.output, model, arguments.rank or arguments.keep_energy, str(name))
    print(f"{_what(chosen)} as a LoRA in {arguments.output}: {_size(_bytes(arguments.output))}")
    print(f"  relative error of what it changes: {error.total:.2g} (0 is the expert, 1 the base model)")
    print("Serve it:", lora_command(arguments.output, str(name)), sep="\n  ")


def _mergekit(bank: ExpertBank, arguments: argparse.Namespace) -> None:
    from peft_svf.experts.lora_export import LoraError
    from peft_svf.experts.mergekit import save_for_mergekit

    made = save_for_mergekit(
        bank,
        arguments.output,
        {arguments.expert: 1.0} if arguments.expert is not None else arguments.mix,
        merge_method=arguments.merge_method,
        density=arguments.density,
        lora_rank=arguments.rank or arguments.keep_energy,
        dtype=_dtype(arguments),
        exact=not arguments.fast,
        include_base=arguments.include_base,
    )
    print(f"{len(made.errors)} experts for mergekit in {arguments.output}: {_size(made.size)}")
    for name, error in made.errors.items():
        if isinstance(error, LoraError):
            print(f"  {name}: LoRA, relative error of what it changes {error.total:.2g}")
        else:
            print(f"  {name}: {_merge_error(error)}")
    print("Merge them (pip install mergekit):", made.command, sep="\n  ")


def _what(chosen: str | dict[str, float]) -> str:
    return chosen if isinstance(chosen, str) else " + ".join(f"{weight:g} {name}" for name, weight in chosen.items())


def _merge_error(error: MergeError | None) -> str:
    if error is None:
        return "error not measured (--fast)"
    return f"rounded by {error.total:.2g} of the adapted weights, {error.of_change:.2g} of what the expert changes"


def _dtype(arguments: argparse.Namespace) -> torch.dtype | None:
    import torch

    return None if arguments.dtype == "auto" else getattr(torch, arguments.dtype)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _size(size: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000  # type: ignore[assignment]
    return f"{size:.3g} GB"
