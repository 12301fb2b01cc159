"""`peft-svf bank`: the folder of a bank, made and changed without loading its base model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_svf.cli.argument_types import DefaultsFormatter


if TYPE_CHECKING:
    from peft_svf.experts.bank_folder import NewExpert

PLAYGROUND = "playground"
_PLACE = "a folder or an id on the Hub"


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `peft-svf bank`."""
    bank = commands.add_parser("bank", help="make, change or list a bank of experts, in its folder")
    actions = bank.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_create(actions)

    add = _action(actions, "add", "add an expert")
    add.add_argument("expert", metavar="[NAME=]EXPERT", help=f"{_PLACE}; its name is the folder's if none is given")
    _add_words(add)
    _add_revision(add, "expert")

    remove = _action(actions, "remove", "remove an expert")
    remove.add_argument("name", metavar="NAME", help="the expert, or the classifier")

    rename = _action(actions, "rename", "give an expert another name")
    rename.add_argument("name", metavar="NAME", help="the expert, or the classifier")
    rename.add_argument("new_name", metavar="NEW_NAME", help="its name from now on")
    rename.add_argument("--label", help="the word that a dispatcher scores for it; the one that it has if not given")

    describe = _action(actions, "describe", "give an expert another label or description")
    describe.add_argument("name", metavar="NAME", help="the expert")
    _add_words(describe)

    show = actions.add_parser("list", help="what is in a bank")
    show.add_argument("bank", nargs="?", metavar="BANK", default=PLAYGROUND, help=f"{_PLACE} (the playground's)")
    show.add_argument("--revision", help="of a bank on the Hub: branch, tag or commit")
    show.set_defaults(run=run)


def _add_create(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    create = actions.add_parser(
        "create",
        help="a new bank of experts that are there already",
        description="Make a bank of experts of one base model. Of the base model only configuration and tokenizer are "
        "read; whether the experts belong to each other is told by their fingerprints, and whether they belong to the "
        "base model when the bank is loaded.",
        formatter_class=DefaultsFormatter,
    )
    add = create.add_argument
    add("bank", metavar="FOLDER", help="where to make it: a new folder")
    add("--model", required=True, metavar="BASE", help=f"the base model: {_PLACE}")
    add(
        "--expert",
        action="extend",
        nargs="+",
        required=True,
        default=[],
        metavar="[NAME=]EXPERT[:LABEL]",
        help=f"{_PLACE}; one or more. The label is the word that a dispatcher scores for it",
    )
    add("--classifier", metavar="[NAME=]EXPERT", help="an expert that classifies prompts and answers none")
    add("--instruction", help="of the prompt dispatcher, instead of one made of labels and descriptions")
    _add_revision(create, "base model")
    _add_card(create)
    create.set_defaults(run=run)


def _action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser], name: str, purpose: str
) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=purpose, formatter_class=DefaultsFormatter)
    parser.add_argument("bank", metavar="BANK", help="the folder of the bank")
    _add_card(parser)
    parser.set_defaults(run=run)
    return parser


def _add_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--label", help="the word that a dispatcher scores for it")
    parser.add_argument("--description", help="which prompts it is for, one line")


def _add_revision(parser: argparse.ArgumentParser, of: str) -> None:
    parser.add_argument("--revision", help=f"revision of the {of} on the Hub: branch, tag or commit")


def _add_card(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-pictures", "--no_pictures", action="store_true", help="cards without pictures")


def run(arguments: argparse.Namespace) -> None:
    """Change the bank, or list it."""
    actions = {"create": _create, "add": _add, "remove": _remove, "rename": _rename, "describe": _describe}
    if arguments.action in actions:
        actions[arguments.action](arguments)
    _list(arguments)


def _create(arguments: argparse.Namespace) -> None:
    from peft_svf.experts.bank_folder import create_bank_folder

    experts: dict[str, NewExpert] = {}
    for word in arguments.expert:
        name, new = named_expert(word, "--expert", has_label=True)
        if name in experts:
            raise ValueError(f"--expert names two experts {name!r}: give them different names, NAME={new.source}")
        experts[name] = new
    create_bank_folder(
        arguments.bank,
        arguments.model,
        experts,
        base_revision=arguments.revision,
        classifier=None if arguments.classifier is None else named_expert(arguments.classifier, "--classifier"),
        instruction=arguments.instruction,
        finish=_card_writer(arguments),
    )


def _add(arguments: argparse.Namespace) -> None:
    from dataclasses import replace

    from peft_svf.experts.bank_folder import add_to_bank_folder

    name, new = named_expert(arguments.expert, "EXPERT")
    new = replace(new, label=arguments.label, description=arguments.description or "", revision=arguments.revision)
    add_to_bank_folder(arguments.bank, name, new, _card_writer(arguments))


def _remove(arguments: argparse.Namespace) -> None:
    from peft_svf.experts.bank_folder import remove_from_bank_folder

    remove_from_bank_folder(arguments.bank, arguments.name, _card_writer(arguments))


def _rename(arguments: argparse.Namespace) -> None:
    from peft_svf.experts.bank_folder import rename_in_bank_folder

    rename_in_bank_folder(arguments.bank, arguments.name, arguments.new_name, arguments.label, _card_writer(arguments))


def _describe(arguments: argparse.Namespace) -> None:
    from peft_svf.experts.bank_folder import describe_in_bank_folder

    if arguments.label is None and arguments.description is None:
        raise ValueError("give a --label, a --description or both")
    describe_in_bank_folder(
        arguments.bank, arguments.name, arguments.label, arguments.description, _card_writer(arguments)
    )


def _list(arguments: argparse.Namespace) -> None:
    from peft_svf.cli.sharing.bank_table import bank_table

    is_new = arguments.action != "list"
    print(bank_table(str(arguments.bank), None if is_new else arguments.revision))


def named_expert(word: str, option: str, has_label: bool = False) -> tuple[str, NewExpert]:
    """
    `"[NAME=]EXPERT[:LABEL]"` as the expert's name and what to add.

    Raises:
        ValueError: No name is given, and the folder's cannot be one.
    """
    from peft_svf.experts.bank_folder import NewExpert

    name, separator, place = word.partition("=")
    if not separator or Path(word).is_dir():
        name, place = "", word
    label: str | None = None
    if has_label and not Path(place).is_dir() and ":" in place:
        place, _, label = place.rpartition(":")
    if not place:
        raise ValueError(f"{option} {word}: no expert is named; it is [NAME=]EXPERT")
    return name or Path(place).absolute().name, NewExpert(place, label)


def _card_writer(arguments: argparse.Namespace) -> Any:
    def write(folder: Path, place: Path) -> None:
        from peft_svf.hub_cards import write_bank_card

        known = (folder / "bank.json").is_file()
        write_bank_card(folder, None if known else {"name": place.name}, pictures=not arguments.no_pictures)

    return write
