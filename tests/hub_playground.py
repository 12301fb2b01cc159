"""The playground's bank as files of a repository, and its configs with changes: for the tests of the Hub."""

from __future__ import annotations

import json
from typing import Any

from hub_store import read_folder

from peft_svf.playground import BANK_FOLDER


BANK = read_folder(BANK_FOLDER)
BASE = {path.removeprefix("base/"): content for path, content in BANK.items() if path.startswith("base/")}
EXPERTS = {path: content for path, content in BANK.items() if path.split("/")[0] in ("math", "code", "reasoning")}
MATH = {path.removeprefix("math/"): content for path, content in BANK.items() if path.startswith("math/")}
CONFIG, ADAPTER = json.loads(BANK["config.json"]), json.loads(MATH["adapter_config.json"])


def config(**changes: Any) -> bytes:
    return json.dumps(CONFIG | changes).encode()


def adapter(**changes: Any) -> bytes:
    return json.dumps(ADAPTER | changes).encode()
