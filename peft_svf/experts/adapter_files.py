"""The files of one SVF adapter, read as a stranger's: nothing is executed, and what cannot be is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from peft_svf.experts.errors import ExpertError
from peft_svf.spectrum.fingerprint import PROJECTIONS
from peft_svf.tuner.config import SVFConfig
from peft_svf.tuner.names import PEFT_PREFIX


EXPERT_FILE = "expert.json"  # what is known of the expert: facts for its card
OFFSET_ENDING = ".svf_offset.weight"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
LARGEST_CONFIG, LARGEST_FACTS = 64 * 2**20, 16 * 2**20  # bytes
DEEPEST = 200  # levels of JSON; an origin takes three for each expert that another was made of
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MODULE = re.compile(r"\w[\w-]*(\.\w[\w-]*)*")
LARGEST_OFFSETS = 2**26  # numbers in one tensor: 1,024 fused experts of 65,536 components


def read_adapter(folder: Path, where: str) -> tuple[SVFConfig, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """
    Read and check `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        folder (`Path`): The adapter's.
        where (`str`): What messages call it, like "the expert /experts/math".

    Returns:
        `tuple[SVFConfig, dict[str, torch.Tensor], dict[str, torch.Tensor]]`: The configuration; what is trained of
        each weight, by module name, shape (k,) or, of fused parameters, (experts, k), float32; and the other tensors,
        by their key.

    Raises:
        ExpertError: A file is missing, damaged or a pickle; the adapter is not SVF; a tensor has a shape that its
            weight does not have, is not of floating point or not finite.
    """
    config = read_config(folder, where)
    path = folder / SAFETENSORS_WEIGHTS_NAME
    _check_there(path, where)
    vectors, others = {}, {}
    try:
        with safe_open(path, framework="pt") as file:
            _check_header(path)
            for key in sorted(file.keys()):
                if key.startswith(PEFT_PREFIX) and key.endswith(OFFSET_ENDING):
                    name = key.removeprefix(PEFT_PREFIX).removesuffix(OFFSET_ENDING)
                    _check_shape(name, file.get_slice(key).get_shape(), config, where)
                    vectors[name] = file.get_tensor(key)
                else:
                    others[key] = file.get_tensor(key)
    except (OSError, ValueError, SafetensorError) as error:
        raise ExpertError(f"{where}: {path.name} is damaged ({error}); get or save the expert again.") from error
    if not vectors:
        raise ExpertError(f"{where} has no offsets in {path.name}: it is no SVF expert.")
    for name, tensor in [*vectors.items(), *others.items()]:  # not one mapping: a name can be among both
        _check_type(name, tensor, where)
    vectors = {name: tensor.to(torch.float32) for name, tensor in vectors.items()}  # may overflow
    for name, tensor in [*vectors.items(), *others.items()]:
        if not torch.isfinite(tensor).all():
            raise ExpertError(f"{where}: '{name}' has values that are not finite; train or save the expert again.")
    return config, vectors, others


def read_config(folder: Path, where: str) -> SVFConfig:
    """Read and check `adapter_config.json` alone; errors as of [`read_adapter`]."""
    path = folder / CONFIG_NAME
    _check_there(path, where)
    content = read_json(path, where, LARGEST_CONFIG)
    kind = content.get("peft_type")
    if kind != "SVF":
        raise ExpertError(f"{where} is of type {kind}; experts are SVF adapters.")
    _check_fingerprint(content.get("base_fingerprint"), where)
    _check_names(content, f"{where}: {path.name}")
    try:
        return SVFConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ExpertError(f"{where}: {path.name} cannot be read ({error}); get or save the expert again.") from error


def read_facts(folder: Path, where: str) -> dict[str, Any]:
    """What `expert.json` says of the expert; nothing if there is no such file."""
    path = folder / EXPERT_FILE
    return read_json(path, where, LARGEST_FACTS) if path.is_file() else {}


def read_json(path: Path, where: str, largest: int) -> dict[str, Any]:
    """The object in a JSON file of at most `largest` bytes; raises an `ExpertError` for anything else."""
    try:
        if path.stat().st_size > largest:
            raise ExpertError(f"{where}: {path.name} is larger than {largest:,} bytes, which no expert needs.")
        text = path.read_text("utf-8")
        content = json.loads(text, object_pairs_hook=_object, parse_float=_number, parse_constant=_number)
        _check_depth(content)
    except (OSError, ValueError, RecursionError) as error:
        raise ExpertError(f"{where}: {path.name} is damaged ({error}); get or save the expert again.") from error
    if not isinstance(content, dict):
        raise ExpertError(f"{where}: {path.name} holds no JSON object; get or save the expert again.")
    return content


def _check_depth(content: Any) -> None:
    """Cards and reports go through facts by recursion, which Python bounds."""
    level = [content]
    for _ in range(DEEPEST):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [item for items in inner for item in items]
    if level:
        raise ValueError(f"it is nested more than {DEEPEST} deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two values with one name, libraries take the one or the other: what was checked need not be what is used."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return dict(pairs)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


def pickles_only(names: Collection[str], where: str) -> ExpertError | None:
    """The error of a folder with these files if its weights are pickles; `None` if they are not."""
    pickles = sorted(name for name in names if PurePosixPath(name).suffix in PICKLED)
    if not pickles or SAFETENSORS_WEIGHTS_NAME in names:
        return None
    return ExpertError(
        f"{where} has {', '.join(pickles)} and no {SAFETENSORS_WEIGHTS_NAME}: pickles can run code and are never read."
        " Ask for a safetensors file; `peft-svf import` converts checkpoints of the paper's code."
    )


def _check_there(path: Path, where: str) -> None:
    if path.is_file():
        return
    names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    pickles = pickles_only(names, where) if path.name == SAFETENSORS_WEIGHTS_NAME else None
    if pickles is not None:
        raise pickles
    raise ExpertError(f"{where} is incomplete: {path.name} is missing; get or save the expert again.")


def _check_names(content: dict[str, Any], where: str) -> None:
    """PEFT takes any JSON for names of models and modules, and fails with it later."""
    for field in ("base_model_name_or_path", "revision"):
        value = content.get(field)
        if value is not None and not (isinstance(value, str) and value.isprintable()):
            raise ExpertError(f"{where} is damaged: {field} must be a text or null; get or save the expert again.")
    for field in ("target_modules", "exclude_modules", "target_parameters", "modules_to_save"):
        value = content.get(field)
        names = value if isinstance(value, list) else [value or ""]
        if not all(isinstance(name, str) for name in names):
            raise ExpertError(f"{where} is damaged: {field} must be names or null; get or save the expert again.")


def _check_fingerprint(fingerprint: Any, where: str) -> None:
    if fingerprint is None:
        return
    sketches = list(fingerprint.values()) if isinstance(fingerprint, dict) else [None]
    for sketch in sketches:
        if not _is_sketch(sketch):
            raise ExpertError(f"{where}: the fingerprint of its base model is damaged; get or save the expert again.")


def _is_sketch(sketch: Any) -> bool:
    """Whether it can be out, in, norm and projections of a weight."""
    if not isinstance(sketch, list) or len(sketch) != 3 + PROJECTIONS:
        return False
    if not all(type(value) in (int, float) and abs(value) < 1e300 for value in sketch):
        return False
    return all(value >= 1 and value == int(value) for value in sketch[:2])


def _check_shape(name: str, shape: list[int], config: SVFConfig, where: str) -> None:
    """A weight of the shape (out, in) has at most min(out, in) singular values."""
    if not _MODULE.fullmatch(name):
        raise ExpertError(f"{where} has offsets for {name!r}, which is no name of a module.")
    if len(shape) not in (1, 2) or 0 in shape or math.prod(shape) > LARGEST_OFFSETS:
        raise ExpertError(f"{where}: the offsets of '{name}' have the shape {shape}, which no weight has.")
    sketch = (config.base_fingerprint or {}).get(name)
    if sketch is not None and len(shape) == 1 and shape[0] > min(sketch[:2]):
        raise ExpertError(
            f"{where}: '{name}' has {shape[0]} offsets, but its weight, {sketch[0]:.0f} × {sketch[1]:.0f}, has only "
            f"{min(sketch[:2]):.0f} singular values."
        )


def _check_type(name: str, tensor: torch.Tensor, where: str) -> None:
    if tensor.dtype not in _FLOATS:
        raise ExpertError(f"{where}: '{name}' holds {tensor.dtype}, not floating-point numbers of 16 bits or more.")


def _check_header(path: Path) -> None:
    """The header of a file that safetensors has accepted; it keeps one of two tensors with the same name."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        json.loads(file.read(size), object_pairs_hook=_object)
