"""`peft-svf mix`: a new expert made of others, or a comparison of them; no base model is loaded."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_svf.cli.argument_types import DefaultsFormatter, positive


if TYPE_CHECKING:
    from peft_svf.experts.expert import Expert

PLAYGROUND = "playground"


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `peft-svf mix`."""
    parser = commands.add_parser(
        "mix",
        help="make an expert of others: mix, negate, shuffle, ...; or compare them",
        description="Mix experts of one base model, z' = Σ weight · z, exactly and without the model. By default the "
        "base model has the rest of the weight. Instead of mixing, one of the operations below.",
        epilog="peft-svf mix math=0.7 code=0.3 --bank playground --output both",
        formatter_class=DefaultsFormatter,
    )
    add = parser.add_argument
    add(
        "experts",
        nargs="+",
        metavar="EXPERT[=WEIGHT]",
        help="folder, id on the Hub, or name in --bank",
    )
    add("--bank", metavar="BANK", help="where to look for names: a folder, an id, or playground")
    add("--output", type=Path, metavar="FOLDER", help="where to save the new expert")
    convention = parser.add_mutually_exclusive_group()
    convention.add_argument(
        "--paper-convention",
        "--paper_convention",
        action="store_true",
        help="the paper's formula as it stands: the base model has no weight, whatever the others sum to",
    )
    convention.add_argument("--normalize", action="store_true", help="divide the weights by their sum")
    _add_operations(parser)
    add("--seed", type=int, default=0, help="of --shuffle and --random-like")
    add("--name", help="of the new expert, for its card")
    add("--label", help="the word that a dispatcher scores for it")
    add("--description", help="which prompts it is for, one line")
    add("--no-pictures", "--no_pictures", action="store_true", help="a card without pictures")
    parser.set_defaults(run=run)


def _add_operations(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("operations").add_mutually_exclusive_group()
    add = group.add_argument
    add("--interpolate", type=finite, metavar="T", help="of two experts: 0 is the first, 1 the second")
    add("--difference", action="store_true", help="of two experts: what the first has beyond the second")
    add("--average", action="store_true", help="the mean, for instance of several seeds, and how far they are apart")
    add("--scale", type=finite, metavar="FACTOR", help="one expert at another strength")
    add("--negate", action="store_true", help="the opposite of one expert")
    add(
        "--top-components",
        "--top_components",
        type=_keep,
        metavar="N|SHARE",
        help="keep the N largest offsets of every matrix, or those that hold a SHARE (like 0.9) of their squares",
    )
    add("--shuffle", action="store_true", help="control: the offsets of every matrix in random order")
    add("--reverse", action="store_true", help="control: the offsets of every matrix in reversed order")
    add("--random-like", "--random_like", action="store_true", help="control: random offsets of the same size")
    add("--compare", action="store_true", help="print how alike experts are: cosine, and overlap of moved components")


def finite(text: str) -> float:
    """A finite number, for argparse."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return value


def _keep(text: str) -> int | float:
    if "." not in text:
        return positive(text)
    value = finite(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"is a number of components, or a share in (0, 1], got {text}")
    return value


def run(arguments: argparse.Namespace) -> None:
    """
    Compare, or make the expert and save it with a card.

    Raises:
        ValueError: For arguments that do not belong together.
        ExpertError: If an expert cannot be read or combined with the others. Nothing was written.
    """
    operation, count = _operation(arguments)
    words = [_split(word) for word in arguments.experts]
    _check(arguments, operation, count, words)
    experts = [_load(place, arguments.bank) for place, _ in words]
    if operation == "compare":
        print(_comparison([place for place, _ in words], experts))
        return
    facts = {"name": arguments.output.absolute().name}
    facts |= {key: text for key in ("name", "label", "description") if (text := getattr(arguments, key)) is not None}
    made = _make(arguments, operation, experts, [weight for _, weight in words], facts)
    _save(made, arguments.output, not arguments.no_pictures)
    _report(made, arguments.output)
    if operation == "average" and len(experts) > 1:
        print(f"  {_spread_text(experts)}")


# How many experts each operation takes; None: any number
_COUNTS = {
    "interpolate": 2,
    "difference": 2,
    "average": None,
    "scale": 1,
    "negate": 1,
    "top_components": 1,
    "shuffle": 1,
    "reverse": 1,
    "random_like": 1,
    "compare": None,
}


def _operation(arguments: argparse.Namespace) -> tuple[str, int | None]:
    for name, count in _COUNTS.items():
        if getattr(arguments, name) not in (None, False):
            return name, count
    return "mix", None


def _split(word: str) -> tuple[str, float | None]:
    """`"math=0.7"` as an expert and its weight; a folder may have "=" in its name."""
    place, separator, weight = word.rpartition("=")
    if not separator or Path(word).is_dir():
        return word, None
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not place or not math.isfinite(value):
        raise ValueError(f"{word}: it is EXPERT=WEIGHT with a finite number, like math=0.7")
    return place, value


def _check(
    arguments: argparse.Namespace, operation: str, count: int | None, words: list[tuple[str, float | None]]
) -> None:
    option = f"--{operation.replace('_', '-')}"
    if operation == "compare":
        if arguments.output is not None:
            raise ValueError("--compare prints tables and writes nothing: leave out --output")
    elif arguments.output is None:
        raise ValueError("--output FOLDER is missing: where to save the new expert")
    if operation == "mix":
        if missing := [place for place, weight in words if weight is None]:
            raise ValueError(f"{missing[0]} has no weight: it is EXPERT=WEIGHT to mix, or choose an operation")
        return
    if given := [place for place, weight in words if weight is not None]:
        raise ValueError(f"{option} takes no weights: leave out that of {given[0]}")
    if arguments.paper_convention or arguments.normalize:
        raise ValueError(f"--paper-convention and --normalize are about mixtures, not about {option}")
    if count is not None and len(words) != count:
        raise ValueError(f"{option} takes {count} expert{'s' if count > 1 else ''}, not {len(words)}")


def _load(place: str, bank: str | None) -> Expert:
    """An expert by its name in the bank, or from a folder or the Hub."""
    from peft_svf.experts.bank_config import BankConfig
    from peft_svf.experts.expert import Expert

    if bank is not None:
        from peft_svf.cli.sharing.bank_table import find_bank

        folder = find_bank(bank)
        names = BankConfig.read(folder).adapters
        if place in names:
            return Expert.from_pretrained(folder, subfolder=place)
        if not Path(place).is_dir() and "/" not in place:
            raise ValueError(f"the bank {bank} has no expert {place!r}, only {', '.join(names)}")
    return Expert.from_pretrained(place)


def _make(
    arguments: argparse.Namespace, operation: str, experts: list[Expert], weights: list[Any], facts: dict[str, Any]
) -> Expert:
    from peft_svf.experts import algebra

    makers: dict[str, Callable[[], Expert]] = {
        "mix": lambda: algebra.mix(experts, weights, not arguments.paper_convention, arguments.normalize, facts),
        "interpolate": lambda: algebra.interpolate(experts[0], experts[1], arguments.interpolate, facts),
        "difference": lambda: algebra.difference(experts[0], experts[1], facts),
        "average": lambda: algebra.average(experts, facts),
        "scale": lambda: algebra.scale(experts[0], arguments.scale, facts),
        "negate": lambda: algebra.negate(experts[0], facts),
        "top_components": lambda: algebra.top_components(experts[0], arguments.top_components, metadata=facts),
        "shuffle": lambda: algebra.shuffle(experts[0], arguments.seed, facts),
        "reverse": lambda: algebra.reverse(experts[0], facts),
        "random_like": lambda: algebra.random_like(experts[0], arguments.seed, facts),
    }
    return makers[operation]()


def _save(expert: Expert, folder: Path, pictures: bool) -> None:
    """The expert with its card, as a whole or not at all."""
    from peft_svf.experts.expert import check_replaceable
    from peft_svf.experts.files import replaced_folder
    from peft_svf.hub_cards import write_expert_card

    target = folder.absolute()
    check_replaceable(target)
    with replaced_folder(target) as staging:
        expert.save_pretrained(staging)
        write_expert_card(staging, pictures=pictures)


def _report(expert: Expert, folder: Path) -> None:
    from peft_svf.cli.terminal import one_line

    origin = expert.metadata["origin"]
    parts = [
        one_line(source["name"]) + (f" = {source['weight']:g}" if "weight" in source else "")
        for source in origin["sources"]
    ]
    settings = [f"{name} {value}" for name, value in origin.get("settings", {}).items() if not isinstance(value, bool)]
    print(f"{origin['formula']}, with {', '.join([*parts, *settings])}")
    numbers = sum(offset.numel() for offset in expert.offsets.values())
    moved = sum(int((offset != 0).sum()) for offset in expert.offsets.values())
    print(f"  {numbers:,} offsets in {len(expert.offsets)} matrices, {moved:,} of them not 0")
    print(f"  base model: {one_line(expert.base_model or 'not recorded', 100)}, fingerprint {expert.fingerprint_id}")
    print(f"The expert is in {folder}; how well it does is not known: peft-svf evaluate --adapter {folder} ...")


def _spread_text(experts: list[Expert]) -> str:
    """How far experts are apart, beside how far they are from the base model."""
    import torch

    from peft_svf.experts import algebra

    spread = torch.cat([each.flatten() for each in algebra.spread(experts).values()])
    mean = torch.cat([each.flatten() for each in algebra.average(experts).offsets.values()])
    return (
        f"standard deviation of an offset over the {len(experts)} experts: {spread.square().mean().sqrt():.3g}; "
        f"size of their mean: {mean.square().mean().sqrt():.3g} (roots of mean squares)"
    )


def _comparison(places: list[str], experts: list[Expert]) -> str:
    from peft_svf.cli.terminal import one_line, table
    from peft_svf.experts import algebra

    short = [Path(place).name for place in places]
    names = [one_line(name, 40) for name in (short if len(set(short)) == len(short) else places)]

    def matrix(values: Any) -> str:
        rows = [["expert", *names]]
        rows += [[name, *(f"{value:.3f}" for value in row)] for name, row in zip(names, values.tolist(), strict=True)]
        return table(rows, right=range(1, len(rows)))

    share = 0.1
    chance = algebra.chance_overlap(experts, share)
    return (
        f"Cosine similarity of the offsets (0: unrelated)\n{matrix(algebra.cosine_similarity(experts))}\n"
        f"Overlap of the {100 * share:.0f} % of components that are moved most ({chance:.3f}: chance)\n"
        f"{matrix(algebra.overlap(experts, share))}"
    )
