"""`peft-svf push`: an expert or a bank to the Hugging Face Hub."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `peft-svf push`."""
    parser = commands.add_parser(
        "push",
        help="put an expert or a bank on the Hugging Face Hub, with its card",
        description="The token is the one of `hf auth login` or HF_TOKEN. Pushing the same again changes nothing.",
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="an expert (an SVF adapter) or a bank")
    add("repository", metavar="USER/NAME", help="where to; created if there is none")
    add("--base-model", "--base_model", metavar="ID", help="the base model's id on the Hub, if a folder is recorded")
    add("--base-revision", "--base_revision", metavar="COMMIT", help="its commit (the newest)")
    add("--include-base", "--include_base", action="store_true", help="put the base model of a bank there, too")
    add("--private", action="store_true", help="make a new repository private")
    add("--branch", help="the branch to write (main); created if there is none")
    add("--tag", help="name for the commit, e.g. v1")
    add("--message", help="of the commit")
    add("--create-pr", "--create_pr", action="store_true", help="open a pull request instead of writing the branch")
    add("--collection", metavar="TITLE", help="collection to list it in; created if there is none")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Push what the folder holds, and print where it is."""
    is_bank = _is_bank(arguments.folder)
    if arguments.include_base and not is_bank:
        raise ValueError("--include-base is for banks; others load an expert onto the base model that it names")
    from transformers.utils import logging

    from peft_svf.hub import push_bank, push_expert

    logging.disable_progress_bar()
    options = {
        "base_model": arguments.base_model,
        "base_revision": arguments.base_revision,
        "private": True if arguments.private else None,
        "branch": arguments.branch,
        "tag": arguments.tag,
        "commit_message": arguments.message,
        "create_pr": arguments.create_pr,
        "collection": arguments.collection,
    }
    if is_bank:
        pushed = push_bank(arguments.folder, arguments.repository, include_base=arguments.include_base, **options)
    else:
        pushed = push_expert(arguments.folder, arguments.repository, **options)
    print(f"The {'bank' if is_bank else 'expert'} is at {pushed.pull_request or pushed.url}")
    print(f"commit {pushed.commit}" + (" (the Hub had the same files already)" if pushed.unchanged else ""))


def _is_bank(folder: Path) -> bool:
    """Whether a folder holds a bank; raises a `ValueError` if it holds no expert either."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    from peft_svf.experts.bank_config import is_bank

    if is_bank(folder, str(folder)):
        return True
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds neither an expert (no adapter_config.json) nor a bank (no config.json of one); give the "
            "folder that save_pretrained or `peft-svf train --output` wrote"
        )
    return False
