"""The configurations of examples/accelerate_configs: accelerate reads them, and they ask for nothing unsupported."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType


CONFIGS = sorted((Path(__file__).resolve().parents[3] / "examples" / "accelerate_configs").glob("*.yaml"))


def load(name: str) -> ClusterConfig:
    (path,) = [path for path in CONFIGS if path.stem == name]
    return load_config_from_file(str(path))


def test_all_are_there() -> None:
    assert [path.stem for path in CONFIGS] == ["cpu", "deepspeed_zero2", "deepspeed_zero3", "fsdp2", "multi_gpu"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_it_and_a_comment_says_when_to_use_it(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig) and config.num_processes >= 2
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ") and 40 < len(first) <= 119


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_launches_more_than_one_process(path: Path) -> None:
    """Anything else goes to its launcher of one process."""
    args = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    args, *_ = _validate_launch_command(args)
    assert args.multi_gpu or args.use_fsdp or args.use_deepspeed
    assert not args.cpu and args.num_processes >= 2


def test_fsdp_is_version_2_with_complete_checkpoints() -> None:
    config = load("fsdp2")
    assert config.distributed_type == DistributedType.FSDP
    assert config.fsdp_config["fsdp_version"] == 2
    assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"  # else no adapter is saved
    assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"]


@pytest.mark.parametrize(("name", "stage"), [("deepspeed_zero2", 2), ("deepspeed_zero3", 3)])
def test_deepspeed_leaves_the_offsets_in_float32(name: str, stage: int) -> None:
    config = load(name)
    assert config.distributed_type == DistributedType.DEEPSPEED
    assert config.deepspeed_config["zero_stage"] == stage
    assert config.mixed_precision == "no"


def test_autocast_is_used_where_there_are_gpus() -> None:
    assert [load(name).mixed_precision for name in ("multi_gpu", "fsdp2", "cpu")] == ["bf16", "bf16", "no"]
    assert load("cpu").use_cpu
