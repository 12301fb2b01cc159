"""`peft-svf import`: a checkpoint of the paper's released code becomes an expert."""

from __future__ import annotations

import argparse
from pathlib import Path

from peft_svf.cli.argument_types import DTYPES


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `peft-svf import`."""
    parser = commands.add_parser(
        "import",
        help="convert an expert of the paper's released code",
        description="Convert policy_params.pt or learnable_params.pt of github.com/SakanaAI/self-adaptive-llms into "
        "an expert. The file is read as tensors only; code in it is not run.",
    )
    add = parser.add_argument
    add("file", type=Path, metavar="FILE.pt", help="policy_params.pt or learnable_params.pt")
    add("--model", required=True, metavar="BASE", help="the base model: a folder or an id on the Hub")
    add("--output", type=Path, required=True, metavar="FOLDER", help="where to write the expert")
    add("--name", help="of the expert (the folder's name)")
    add("--label", help="the word that dispatchers score for it")
    add("--description", help="which prompts it is for, one line")
    add("--mask", choices=("sigmoid", "identity"), help="identity: learnable_params.pt is that of a few-shot search")
    add("--round-mask", "--round_mask", action="store_true", help="round sigmoid(p) to bfloat16, as the code does")
    add("--layers", type=int, nargs="+", metavar="INDEX", help="the layers that a policy_params.pt is for, if not all")
    add("--revision", help="revision of the base model on the Hub")
    add("--dtype", choices=DTYPES, default="auto", help="of the base model")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """
    Convert and write the expert, and print what it is and how to use it.

    Raises:
        ExpertError: If the file cannot be read, belongs to another base model, or the folder holds something else.
        ValueError: If there is no such base model.
    """
    from peft_svf.cli.models import BaseModel
    from peft_svf.experts import ExpertError
    from peft_svf.experts.bank_config import MODEL_TYPE
    from peft_svf.experts.merged_export import check_empty
    from peft_svf.experts.released_code import import_released_expert, read_tensors
    from peft_svf.hub_cards import write_expert_card

    check_empty(arguments.output.absolute())
    read_tensors(arguments.file)  # before a large model is loaded
    base = BaseModel(arguments.model, arguments.revision, arguments.dtype)
    base.check()
    if _model_type(arguments) == MODEL_TYPE:
        raise ExpertError(f"{arguments.model} is a bank; give the base model that the checkpoint was trained on.")
    name = arguments.name or arguments.output.absolute().name
    facts = {"name": name, "label": arguments.label, "description": arguments.description}
    expert = import_released_expert(
        arguments.file,
        base.load(),
        mask=arguments.mask,
        round_mask=arguments.round_mask,
        layers=arguments.layers,
        metadata={key: value for key, value in facts.items() if value},
    )
    expert.save_pretrained(arguments.output)
    write_expert_card(arguments.output)
    settings = expert.metadata["origin"]["settings"]
    numbers = sum(offset.numel() for offset in expert.offsets.values())
    print(f"{name}: {numbers:,} scales of {settings['matrices']} MLP weights, from a {settings['kind']} file")
    print(f"  {expert.metadata['origin']['formula']}")
    print(f"The expert is in {arguments.output}:")
    print(f"  peft-svf generate --model {arguments.model} --adapter {name}={arguments.output} --expert {name} PROMPT")


def _model_type(arguments: argparse.Namespace) -> str:
    from transformers import AutoConfig

    return str(AutoConfig.from_pretrained(arguments.model, revision=arguments.revision).model_type)
