"""The metadata of a card: what the Hub reads to find, link and run an expert or a bank, checked offline."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from peft_svf.hub_cards.expert_facts import ExpertCardData, is_repo_id
from peft_svf.hub_cards.results import index_entries
from peft_svf.hub_cards.text import clean


TAGS = ("peft", "svf", "transformer2")
PIPELINE_TAGS = ("text-generation", "image-text-to-text")  # tasks of the Hub, which does not know ours
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,4})?|code|multilingual")

# What the Hub knows (https://huggingface.co/docs/hub/repositories-licenses); others are "other" with a name
_LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    other
"""
LICENSES = frozenset(_LICENSES.split())


def expert_metadata(facts: ExpertCardData) -> ModelCardData:
    """The metadata of an expert's card."""
    entries = index_entries(facts.results)
    return ModelCardData(
        **base_entries(facts.base_model),
        **license_entries(facts.license),
        library_name="peft",
        pipeline_tag=facts.pipeline_tag if facts.pipeline_tag in PIPELINE_TAGS else PIPELINE_TAGS[0],
        datasets=hub_ids(facts.datasets),
        language=[code for code in facts.language if _LANGUAGE.fullmatch(code)] or None,
        eval_results=entries or None,
        model_name=clean(facts.name, 96) if entries else None,  # without it huggingface_hub refuses the entries
    )


def base_entries(base_model: str | None) -> dict[str, Any]:
    """Base model, relation and tags; a folder of this machine is nothing that the Hub could link."""
    if not is_hub_id(base_model):
        return {"tags": [*TAGS]}
    return {
        "base_model": base_model,
        "base_model_relation": "adapter",
        "tags": [*TAGS, f"base_model:adapter:{base_model}"],
    }


def license_entries(license: str | None) -> dict[str, Any]:
    """The license as the Hub wants it: one that it knows, or "other" with a name."""
    text = clean(license or "", 96)
    if not text:
        return {}
    if text.lower() in LICENSES:
        return {"license": text.lower()}
    name = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")
    return {"license": "other", **({"license_name": name} if name else {})}


def hub_ids(names: Sequence[str]) -> list[str] | None:
    """Those names that can be repositories."""
    return [name for name in names if is_repo_id(name)] or None


def is_hub_id(name: str | None) -> bool:
    """Whether a base model's name can be a repository on the Hub; a folder of that name here makes it a local path."""
    return name is not None and is_repo_id(name) and not Path(name).exists()


def is_revision(name: str | None) -> bool:
    """Whether a text can be a branch, tag or commit."""
    return name is not None and _REVISION.fullmatch(name) is not None


def check_survives(text: str, metadata: ModelCardData, name: str) -> None:
    """Raise a `ValueError` unless `huggingface_hub` reads back from the card what was meant."""
    read = ModelCard(text).data
    if read.to_dict() != metadata.to_dict():
        raise ValueError(f"the card of {name!r} does not survive parsing: check its license, data sets and results")
