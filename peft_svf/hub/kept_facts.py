"""What a repository already says of an expert or a bank, and a push with fewer facts does not take back.

- The same expert (its values are those on the Hub): every fact that the push does not give stays.
- Another expert in its place: name, label, description, license and languages stay, which are about the repository;
  how the former one was trained and what it reached would be false of the new one, so that goes, with a warning.

A fact that is given as `None` is taken back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers.utils import logging

from peft_svf.experts.adapter_files import EXPERT_FILE, LARGEST_FACTS, read_json
from peft_svf.experts.bank_config import BASE_FOLDER
from peft_svf.experts.errors import ExpertError
from peft_svf.hub.destination import Destination
from peft_svf.hub.errors import as_hub_errors
from peft_svf.hub.remote import Remote, content_ids, read_remote
from peft_svf.hub_cards.bank_facts import BANK_FILE
from peft_svf.hub_cards.expert_facts import ExpertCardData


OF_THE_REPOSITORY = ("name", "label", "description", "license", "language")
_OF_THE_FILES = (  # what the adapter says itself
    "repo_id",
    "base_model",
    "base_revision",
    "fingerprint_id",
    "parametrization",
    "adapted_modules",
    "file_bytes",
    "trained_parameters",
)

logger = logging.get_logger(__name__)


def remote_before(destination: Destination) -> Remote:
    """The repository as the push finds it."""
    with as_hub_errors(f"push to {destination.repo_id}"):
        return read_remote(destination)


def kept_facts(
    before: Remote, destination: Destination, folder: Path, name: str, said: Collection[str]
) -> dict[str, Any]:
    """
    The facts of an expert that stay as the repository has them.

    Args:
        before ([`Remote`]): The repository, before the push.
        destination ([`Destination`]): Where it is.
        folder (`Path`): The expert that is staged.
        name (`str`): Its folder in the repository; "" is the root.
        said (`Collection[str]`): The facts that the push gives.
    """
    place = f"{name}/" if name else ""
    found = _facts_on_hub(before, destination, f"{place}{EXPERT_FILE}")
    try:
        ExpertCardData.from_metadata(found)
    except ValueError:
        return {}  # of no use to a card
    is_same = is_same_expert(before, folder, name)
    return _kept(found, said, is_same, f"{destination.repo_id}{f'/{name}' if name else ''}", before.head)


def kept_facts_of_bank(
    before: Remote, destination: Destination, folder: Path, experts: Collection[str], said: Collection[str]
) -> dict[str, Any]:
    """The same for what is known of a bank as a whole; it is the same bank if it has the same `experts`."""
    found = _facts_on_hub(before, destination, BANK_FILE)
    is_same = set(before.folders) - {BASE_FOLDER} == set(experts) and all(
        is_same_expert(before, folder / name, name) for name in experts
    )
    return _kept(found, said, is_same, destination.repo_id, before.head)


def is_same_expert(before: Remote, folder: Path, name: str) -> bool:
    """Whether the repository has the values of the expert that is staged in `folder`."""
    path = f"{name}/{SAFETENSORS_WEIGHTS_NAME}" if name else SAFETENSORS_WEIGHTS_NAME
    return before.files.get(path) in content_ids(folder / SAFETENSORS_WEIGHTS_NAME)


def _facts_on_hub(before: Remote, destination: Destination, file: str) -> dict[str, Any]:
    if file not in before.files:
        return {}
    with as_hub_errors(f"push to {destination.repo_id}"):
        path = hf_hub_download(
            destination.repo_id,
            file,
            revision=before.head,
            token=destination.token,
            endpoint=destination.api.endpoint,
        )
    try:
        return read_json(Path(path), destination.repo_id, LARGEST_FACTS)
    except ExpertError:
        return {}  # the push replaces it


def _kept(
    found: Mapping[str, Any], said: Collection[str], is_same: bool, what: str, commit: str | None
) -> dict[str, Any]:
    open_facts = {
        key: value
        for key, value in found.items()
        if key not in said and key not in _OF_THE_FILES and value not in (None, "", [], {})
    }
    if is_same:
        return open_facts
    lost = sorted(set(open_facts) - set(OF_THE_REPOSITORY))
    if lost:
        logger.warning(
            f"{what} is replaced by another expert, of which this is not known: {', '.join(lost)}. Push again with "
            f"facts={{...}} if you know it; what the card said of the former one is in commit {(commit or '')[:7]}."
        )
    return {key: value for key, value in open_facts.items() if key in OF_THE_REPOSITORY}
