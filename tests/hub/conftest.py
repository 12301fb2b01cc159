"""A Hub on the loopback interface that in-process calls of huggingface_hub, PEFT and transformers go to."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session


sys.path.insert(0, str(Path(__file__).parents[1]))
import hub_playground  # noqa: F401
from hub_server import HubServer


sys.path.pop(0)


@pytest.fixture(scope="module")
def hub_of_module() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server
        close_session()  # connections to this server, of which the next module knows nothing


@pytest.fixture
def hub(hub_of_module: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HubServer:
    """An empty Hub and an empty cache (`tmp_path / "hf"`); the token of this process is "writer".

    `huggingface_hub` reads its environment when it is imported, so the constants are what has to change.
    """
    hub_of_module.reset()
    home = tmp_path / "hf"
    template = hub_of_module.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": hub_of_module.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "writer")
    api: Any = __import__("huggingface_hub").hf_api.api  # what `huggingface_hub.create_repo` and the like belong to
    monkeypatch.setattr(api, "endpoint", hub_of_module.url)
    # transformers keeps a client with the address of the first Hub that it sees
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    return hub_of_module


@pytest.fixture
def offline(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """`offline()`: as if this process had been started with HF_HUB_OFFLINE=1."""
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def in_process(hub: HubServer, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`in_process(code, offline=False)`: run Python code in a second process with the Hub and the cache of the test.

    Importing takes it 10 to 15 seconds: for a handful of tests.
    """

    def run(code: str, offline: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_TOKEN": "writer",
            "HF_HUB_OFFLINE": "1" if offline else "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONSAFEPATH": "1",
        }
        removed = {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_XET_CACHE", "TRANSFORMERS_CACHE"}
        inherited = {key: value for key, value in os.environ.items() if key not in removed}
        return subprocess.run(
            [sys.executable, "-c", code],
            env={**inherited, **settings, **environment},
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
        )

    return run
