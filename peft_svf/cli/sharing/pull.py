"""`peft-svf pull`: an expert or a bank from the Hugging Face Hub, checked."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `peft-svf pull`."""
    parser = commands.add_parser(
        "pull",
        help="get an expert or a bank from the Hugging Face Hub, and check it",
        description="The token, for private repositories, is the one of `hf auth login` or HF_TOKEN.",
    )
    add = parser.add_argument
    add("repository", metavar="USER/NAME", help="the expert or bank")
    add("--revision", help="branch, tag or commit (the main branch)")
    add("--output", type=Path, metavar="FOLDER", help="where to put it (the Hub's cache)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Pull it, and print what it is."""
    from peft_svf.cli.terminal import visible
    from peft_svf.hub import pull

    pulled = pull(arguments.repository, arguments.output, revision=arguments.revision)
    base = "in the bank" if pulled.has_base else visible(pulled.base_model)
    at = f" at {visible(pulled.base_revision)}" if pulled.base_revision else ""
    print(f"{pulled.repo_id} is {pulled.kind}, commit {pulled.commit}")
    print(f"base model: {base}{at}")
    for name, fingerprint in pulled.fingerprints.items():
        print(f"fingerprint of the base model{f' of {visible(name)}' if name else ''}: {fingerprint}")
    print(f"It is in {pulled.folder}")
