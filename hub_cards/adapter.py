"""What an adapter's own files say of an expert: they are right where an `expert.json` says otherwise."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from peft_svf.experts.adapter_files import read_adapter, read_facts
from peft_svf.experts.expert import Expert
from peft_svf.hub_cards.expert_facts import ExpertCardData
from peft_svf.hub_cards.metadata import is_hub_id


_LAYER = re.compile(r"(?:.*?\.)?\d+(?=\.)")  # to the number of the layer: a model can have several stacks of them
MOST_KINDS = 12  # of modules that a card lists


def expert_card_data(expert: Expert, name: str = "expert") -> ExpertCardData:
    """
    The facts of an expert: its metadata, and what its offsets and configuration say.

    Args:
        expert ([`~peft_svf.experts.Expert`]): The expert.
        name (`str`, *optional*, defaults to `"expert"`): If its metadata have none.

    Raises:
        ValueError: The metadata cannot be used; the message names the fact.
    """
    return with_adapter(ExpertCardData.from_metadata(expert.metadata, name), expert)


def with_adapter(facts: ExpertCardData, expert: Expert) -> ExpertCardData:
    """The facts with those that the adapter itself says."""
    config = expert.config
    named = expert.base_model
    base = next((base for base in (named, facts.base_model) if is_hub_id(base)), named or facts.base_model)
    return replace(
        facts,
        base_model=base,
        base_revision=expert.base_revision or facts.base_revision,
        trained_parameters=sum(offset.numel() for offset in expert.offsets.values()),
        adapted_modules=adapted_modules(expert.offsets),
        fingerprint_id=expert.fingerprint_id,
        parametrization=facts.parametrization or config.parametrization,
    )


def read_expert(folder: Path) -> Expert | None:
    """
    The adapter in a folder, in either parametrization; `None` if there is none.

    Of the parametrization "sigmoid" the numbers are logits, not z − 1: good for counting and naming only.
    """
    if not (folder / CONFIG_NAME).is_file() or not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        return None
    where = f"the expert {folder.name}"
    config, vectors, others = read_adapter(folder, where)
    return Expert(vectors, config, read_facts(folder, where), others, where)


def adapted_modules(names: Iterable[str]) -> str:
    """`"down_proj, up_proj in 2 layers (4 matrices)"`."""
    names = list(names)
    kinds = Counter(name.rpartition(".")[2] for name in names)
    layers = {found[0] for name in names if (found := _LAYER.match(name))}
    rest = [f"and {len(kinds) - MOST_KINDS} more"] if len(kinds) > MOST_KINDS else []
    shown = [*sorted(kinds)[:MOST_KINDS], *rest]
    within = f" in {len(layers)} layer{'s' * (len(layers) != 1)}" if layers else ""
    return f"{', '.join(shown)}{within} ({len(names)} {'matrix' if len(names) == 1 else 'matrices'})"
