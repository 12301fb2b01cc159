"""What a push says about an expert: its recorded facts, with the Hub's names in place of this machine's."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_svf.experts.errors import HubError
from peft_svf.hub.base_reference import BaseReference


_PATH = re.compile(r"(?<![\w:/.~-])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\'\"`<>|:*?()\[\]{},;]+)+[/\\]?")


def published_facts(
    recorded: Mapping[str, Any],
    given: Any,
    name: str,
    repo_id: str | None,
    base: BaseReference,
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """
    The content of a published expert.json.

    Args:
        recorded (`Mapping[str, Any]`): What is known of the expert: the content of its expert.json.
        given (`Mapping[str, Any]` or `ExpertCardData`, *optional*): What the user says now; it wins.
        name (`str`): Its name, if none is recorded.
        repo_id (`str`, *optional*): Where it will be.
        base ([`BaseReference`]): Its base model.
        defaults (`Mapping[str, Any]`, *optional*): For what is neither recorded nor given.
    """
    said = as_mapping(given)
    facts: dict[str, Any] = {"name": name, **(defaults or {})}
    for source in (recorded, said):
        facts.update({key: value for key, value in source.items() if value not in (None, "", [], {})})
    if repo_id is not None:
        facts["repo_id"] = repo_id
    facts["base_model"], facts["base_revision"] = base.model, base.revision
    return without_local_paths(facts)


def as_mapping(facts: Any) -> Mapping[str, Any]:
    """Facts that somebody gives: a mapping, the data of a card, or nothing."""
    if facts is None or isinstance(facts, Mapping):
        return facts or {}
    if not hasattr(facts, "to_metadata"):
        raise HubError(f"facts are a mapping or the data of a card (ExpertCardData, BankCardData), not {facts!r:.80}.")
    return dict(facts.to_metadata())


def without_local_paths(value: Any) -> Any:
    """The same JSON with the path of every file and folder of this machine cut down to its last part."""
    if isinstance(value, Mapping):
        return {key: without_local_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_local_paths(item) for item in value]
    if isinstance(value, str):
        return _PATH.sub(lambda match: _shortened(match[0]), value)
    return value


def local_places() -> list[str]:
    """What no file on the Hub has any reason to name: the home, temporary and current folders of this machine."""
    home, others = Path.home(), (Path.cwd(), Path(tempfile.gettempdir()))
    places = [str(place) for place in (home, *others) if len(place.parts) > 2]
    return [*places, *([f"{home}/"] if len(home.parts) == 2 else [])]


def _shortened(path: str) -> str:
    places = [str(place) for place in (Path.home(), Path.cwd(), Path(tempfile.gettempdir())) if len(place.parts) > 1]
    expanded = Path(path).expanduser()
    if any(expanded.is_relative_to(place) for place in places) or (len(expanded.parts) > 2 and _exists(expanded)):
        return expanded.name
    return path


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:  # within a folder of somebody else
        return True
    except OSError:  # too long to be a path
        return False
