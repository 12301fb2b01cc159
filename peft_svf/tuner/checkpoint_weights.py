"""Weights read one by one from a checkpoint on disk or on the Hub, never the whole model.

Only safetensors files are read: their header says where each tensor lies, and nothing in them is ever executed.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open


SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"  # of a checkpoint in shards: {"weight_map": {key: file name}}
UNQUANTIZED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class CheckpointWeights:
    """The weights of the linear layers of a checkpoint, by module name.

    Args:
        source (`str`): Folder or Hub id of the checkpoint, with `model.safetensors`, or with
            `model.safetensors.index.json` and the shards it names. From the Hub, only the shards that are read are
            downloaded, all from one commit; the local cache serves without a network.

    Raises:
        ValueError: There is no such checkpoint, it is damaged, or it holds nothing but pickled weights.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        folder = Path(source).expanduser()
        self._files = _Folder(folder) if folder.exists() else _Repository(source)
        self._file_of_key = self._read_keys()

    def read(self, module_name: str) -> torch.Tensor:
        """The weight of the module that the model calls `module_name`; as [`~CheckpointWeights.read_parameter`]."""
        return self.read_parameter(f"{module_name}.weight")

    def read_parameter(self, parameter_name: str) -> torch.Tensor:
        """One parameter, in the dtype and layout of the checkpoint.

        Args:
            parameter_name (`str`): The name that it has in the model. In the checkpoint it may have one component more
                or less in front: `model.layers.0…` may be stored as `layers.0…`, and the other way round.

        Raises:
            ValueError: The checkpoint has no such parameter, has several, has it in quantized form, or is damaged.
        """
        key = self._key_of(parameter_name)
        name = self._file_of_key[key]
        try:
            with safe_open(self._files.path(name), framework="pt") as file:
                weight: torch.Tensor = file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read '{key}' from '{name}' of '{self.source}': {_first_line(error)}") from error
        if weight.dtype not in UNQUANTIZED:
            raise ValueError(
                f"'{key}' of '{self.source}' is quantized ({weight.dtype}); give the unquantized checkpoint"
            )
        return weight

    def _read_keys(self) -> dict[str, str]:
        name = self._files.first_of(SINGLE_FILE, INDEX_FILE)
        path = self._files.path(name)
        try:
            if name == SINGLE_FILE:
                with safe_open(path, framework="pt") as file:
                    return dict.fromkeys(file.keys(), name)
            file_of_key = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            if not all(isinstance(shard, str) and Path(shard).name == shard for shard in file_of_key.values()):
                raise ValueError("its shards are not plain file names")
            return file_of_key
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"'{name}' of '{self.source}' is damaged: {_first_line(error)}") from error

    def _key_of(self, wanted: str) -> str:
        if wanted in self._file_of_key:
            return wanted
        matches = [key for key in self._file_of_key if key.partition(".")[2] == wanted]
        shorter = wanted.partition(".")[2]
        if shorter in self._file_of_key:
            matches.append(shorter)
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise ValueError(f"'{self.source}' has several weights that may be '{wanted}': {_quote(matches)}")
        near = difflib.get_close_matches(wanted, self._file_of_key, n=3, cutoff=0.0)
        raise ValueError(
            f"'{self.source}' has no '{wanted}', not even with one component more or less in front; the nearest keys "
            f"are {_quote(near)}. A checkpoint of another model, a quantized one, or one whose weights transformers "
            "renames or fuses while it loads them cannot be the source of a singular basis"
        )


class _Folder:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / name

    def first_of(self, *names: str) -> str:
        for name in names:
            if self.path(name).is_file():
                return name
        pickled = sorted(path.name for path in self.folder.glob("*.bin"))
        raise ValueError(
            f"'{self.folder}' has neither {' nor '.join(names)}"
            + (f", only pickled weights ({pickled[0]}), which are not read: {_CONVERT}" if pickled else "")
        )


class _Repository:
    """A repository on the Hub, at the commit that its first file came from."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.commit: str | None = None

    def path(self, name: str) -> Path:
        path = Path(hf_hub_download(self.name, name, revision=self.commit))
        self.commit = path.parent.name  # …/snapshots/<commit>/<file>
        return path

    def first_of(self, *names: str) -> str:
        reasons = []
        for name in names:
            try:
                self.path(name)
                return name
            except (OSError, ValueError) as error:  # no such file or repository, no access, offline, not a valid id
                reasons.append(_first_line(error))
        raise ValueError(
            f"'{self.name}' is not a folder, and neither {' nor '.join(names)} could be had from the Hub: "
            f"{reasons[-1]} (pickled weights are not read: {_CONVERT})"
        )


_CONVERT = "load the model with transformers and save it again with `save_pretrained`"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _quote(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
