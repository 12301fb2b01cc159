"""Checkpoints on disk: complete or absent, whatever happens; and runs that go on from them with the same numbers."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import EarlyStoppingCallback, TrainerCallback

from peft_svf.trainers import SVFPolicyGradientTrainer
from peft_svf.trainers.checkpoints import checkpoint_files as files
from peft_svf.trainers.checkpoints.hub_push import PushesExperts


MakeTrainer = Callable[..., SVFPolicyGradientTrainer]
TIMES = ("runtime", "per_second", "step_time")


class Killed(BaseException):
    """Stands for SIGKILL where a test has to look at what is left: nothing may catch it."""


def write_checkpoint(folder: Path, value: float = 0.0) -> Path:
    folder.mkdir(parents=True)
    save_file({"offset": torch.full((40,), value)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"value": value}))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.zeros(40)}, folder / name)
    return folder


def value_of(folder: Path) -> float:
    return load_file(folder / "adapter_model.safetensors")["offset"][0].item()


def die_at_call(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    """Die before the k-th change of a name on the disk."""
    calls = iter(range(k))

    def dying(original: Callable[..., None]) -> Callable[..., None]:
        def change(*args: Any, **kwargs: Any) -> None:
            if next(calls, None) is None:
                raise Killed
            original(*args, **kwargs)

        return change

    for name in ("rename", "replace", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))


# -- files -----------------------------------------------------------------------------------------------------------
def test_a_complete_checkpoint_is_usable(tmp_path: Path) -> None:
    assert files.why_unusable(write_checkpoint(tmp_path / "checkpoint-1")) is None


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
@pytest.mark.parametrize("length", [None, 0, 7, -1])
def test_a_missing_or_truncated_file_is_named(tmp_path: Path, name: str, length: int | None) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint-1")
    if length is None:
        os.unlink(checkpoint / name)
    else:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[:length])
    reason = files.why_unusable(checkpoint)
    words = {"adapter_model.safetensors": "weights", "optimizer.pt": "optimizer"} if length is None else {}
    assert reason is not None and words.get(name, name) in reason


@pytest.mark.parametrize("start", [b"\xff" * 8, b"\0" * 8, b"\0" * 7 + b"\x10"], ids=["huge", "zero", "large"])
def test_weights_with_a_damaged_header_are_named(tmp_path: Path, start: bytes) -> None:
    weights = write_checkpoint(tmp_path / "checkpoint-1") / "adapter_model.safetensors"
    weights.write_bytes(start + weights.read_bytes()[8:])
    assert files.why_unusable(weights.parent) == "adapter_model.safetensors is damaged"


def test_weights_alone_are_no_checkpoint_to_resume_from(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint-1")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        os.unlink(checkpoint / name)
    assert "save_only_model" in str(files.why_unusable(checkpoint))
    assert files.why_unusable(checkpoint, with_optimizer=False) is None


@pytest.mark.parametrize("k", range(6))
def test_a_checkpoint_that_replaces_another_is_never_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    final = write_checkpoint(tmp_path / "checkpoint-1", 1.0)
    staged = write_checkpoint(tmp_path / files.STAGING / "checkpoint-1", 2.0)
    with monkeypatch.context() as patch:
        die_at_call(patch, k)
        with contextlib.suppress(Killed):
            files.publish_folder(staged, final)
    files.clean(tmp_path)
    assert files.newest_usable(tmp_path)[0] == final
    assert value_of(final) == (1.0 if k < 2 else 2.0)
    assert os.listdir(tmp_path) == ["checkpoint-1"]


@pytest.mark.parametrize("old", [None, 1.0, 2.0])
@pytest.mark.parametrize("k", range(9))
def test_a_saved_model_is_whole_or_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int, old: float | None
) -> None:
    final = tmp_path / "model"
    if old is not None:
        write_checkpoint(final, old)
    staged = write_checkpoint(tmp_path / "staged", 2.0)
    with monkeypatch.context() as patch:
        die_at_call(patch, k)
        with contextlib.suppress(Killed):
            files.publish_model(staged, final)
    if (final / "adapter_config.json").exists():
        assert json.loads((final / "adapter_config.json").read_text())["value"] == value_of(final)
    assert k < 7 or value_of(final) == 2.0


def test_rotation_keeps_the_protected_and_the_newest(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        os.utime(write_checkpoint(tmp_path / f"checkpoint-{step}"), (step, step))
    files.rotate(tmp_path, 3, [tmp_path / "checkpoint-4", tmp_path / "checkpoint-10"])
    assert [path.name for path in files.checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-8", "checkpoint-10"]
    files.rotate(tmp_path, 1, [tmp_path / "checkpoint-4", tmp_path / "checkpoint-10"])
    assert [path.name for path in files.checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-10"]


@pytest.mark.parametrize("k", range(4))
def test_no_half_of_a_deleted_checkpoint_is_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint-1")
    with monkeypatch.context() as patch:
        die_at_call(patch, k)
        with pytest.raises(Killed):
            files.delete(checkpoint)
    assert not checkpoint.exists() or files.why_unusable(checkpoint) is None


# -- going on with the same numbers ----------------------------------------------------------------------------------
def numbers(trainer: SVFPolicyGradientTrainer) -> list[dict[str, Any]]:
    """The log without times."""
    return [
        {key: value for key, value in entry.items() if not any(time in key for time in TIMES)}
        for entry in trainer.state.log_history
    ]


def same_numbers(one: SVFPolicyGradientTrainer, other: SVFPolicyGradientTrainer) -> bool:
    offsets = [{n: p for n, p in trainer.model.named_parameters() if p.requires_grad} for trainer in (one, other)]
    for entry, expected in zip(numbers(one), numbers(other), strict=True):
        assert entry == expected
    assert one.state.best_metric == other.state.best_metric
    assert one.state.best_model_checkpoint == other.state.best_model_checkpoint
    return all(torch.equal(parameter, offsets[1][name]) for name, parameter in offsets[0].items())


def graded_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """In thirds, so that evaluations differ."""
    words = [completion[0]["content"].split() for completion in completions]
    return [sum(word.isdigit() and int(word) % 2 == 0 for word in answer) / 3 - 1 for answer in words]


UNALIGNED = {  # epochs of 3 optimizer steps, the last of half the batch; saves between logs
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 1,
    "max_steps": 7,
    "logging_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "load_best_model_at_end": True,
    "learning_rate": 3e-2,
    "learning_curve": False,
}


def arguments(tiny: SimpleNamespace, patience: int = 100) -> dict[str, Any]:
    return {
        "reward_funcs": graded_reward,
        "train_dataset": tiny.prompts(40),
        "callbacks": [EarlyStoppingCallback(patience)],
    }


def test_a_resumed_run_gives_the_numbers_of_a_whole_one(
    make_trainer: MakeTrainer, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    whole = make_trainer(arguments(tiny), **UNALIGNED)
    whole.train()
    assert len({entry["eval_reward"] for entry in numbers(whole) if "eval_reward" in entry}) > 2
    for step in (2, 3, 5, 7):  # in the first epoch, between two, in the second, at the end
        resumed = make_trainer(arguments(tiny), **UNALIGNED)
        resumed._start = {name: tensor + 1.0 for name, tensor in resumed._start.items()}  # as from another seed
        resumed.train(resume_from_checkpoint=tmp_path / "run" / f"checkpoint-{step}")
        assert same_numbers(whole, resumed)
        assert all(torch.equal(tensor, resumed._start[name]) for name, tensor in whole._start.items())


def test_early_stopping_counts_on_and_stops_where_it_stopped(
    make_trainer: MakeTrainer, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    options = {**UNALIGNED, "learning_rate": 1e-9}  # nothing improves
    whole = make_trainer(arguments(tiny, patience=3), **options)
    whole.train()
    assert whole.state.global_step == 3
    for step in (2, 3):
        resumed = make_trainer(arguments(tiny, patience=3), **options)
        resumed.train(resume_from_checkpoint=tmp_path / "run" / f"checkpoint-{step}")
        assert resumed.state.global_step == 3
        assert same_numbers(whole, resumed)


def patience_spent(trainer: SVFPolicyGradientTrainer) -> list[int]:
    callbacks = trainer.callback_handler.callbacks
    return [c.early_stopping_patience_counter for c in callbacks if isinstance(c, EarlyStoppingCallback)]


def test_a_resumed_run_may_have_callbacks_that_its_checkpoint_does_not_know(
    make_trainer: MakeTrainer, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    options = {**UNALIGNED, "learning_rate": 1e-9}  # nothing improves
    make_trainer({**arguments(tiny), "callbacks": []}, **options).train()
    resumed = make_trainer(arguments(tiny), **options)
    resumed.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-5")
    assert resumed.state.global_step == 7 and patience_spent(resumed) == [2]


def test_each_of_several_callbacks_of_a_class_counts_on(
    make_trainer: MakeTrainer, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    options = {**UNALIGNED, "learning_rate": 1e-9, "early_stopping_patience": 50}
    whole = make_trainer(arguments(tiny), **options)
    whole.train()
    resumed = make_trainer(arguments(tiny), **options)
    resumed.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-5")
    assert patience_spent(resumed) == patience_spent(whole) == [7, 7]


def test_true_falls_back_to_the_newest_complete_checkpoint(
    make_trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, options = tmp_path / "run", {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(**options)
    with caplog.at_level(logging.WARNING, logger="peft_svf"):
        whole.train(resume_from_checkpoint=True)  # as a job does that may have been killed before
    assert "starts from zero" in caplog.text
    truncated = run / "checkpoint-3" / "adapter_model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-1])
    (run / files.STAGING / "checkpoint-4").mkdir(parents=True)

    resumed = make_trainer(**options)
    with pytest.raises(ValueError, match=r"checkpoint-3: adapter_model.safetensors is truncated.*checkpoint-2"):
        resumed.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    with pytest.raises(ValueError, match="no such folder"):
        resumed.train(resume_from_checkpoint=str(run / "checkpoint-30"))
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="peft_svf"):
        resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-3 is incomplete and passed over: adapter_model.safetensors is truncated" in caplog.text
    assert same_numbers(whole, resumed)
    assert not (run / files.STAGING).exists()
    assert files.newest_usable(run) == (run / "checkpoint-3", {})

    for checkpoint in files.checkpoints(run):
        os.unlink(checkpoint / "trainer_state.json")
    with pytest.raises(ValueError, match=r"No checkpoint in .* is complete \(checkpoint-3: trainer_state.json is mis"):
        resumed.train(resume_from_checkpoint=True)


# -- saving ----------------------------------------------------------------------------------------------------------
def test_the_best_checkpoint_is_named_by_its_place_and_kept(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    run, seen = tmp_path / "run", []
    scores = {0: -1.0, 1: -0.5, 2: 0.5, 3: 0.4, 4: 0.3}

    def scripted(completions: list[Any], trainer_state: Any, **kwargs: Any) -> list[float]:
        return [scores[trainer_state.global_step]] * len(completions)

    class Look(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            saved = json.loads((run / f"checkpoint-{state.global_step}" / "trainer_state.json").read_text())
            assert saved["best_model_checkpoint"] == state.best_model_checkpoint
            seen.append((saved["best_model_checkpoint"], [path.name for path in files.checkpoints(run)]))

    options = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer = make_trainer({"reward_funcs": scripted, "callbacks": [Look()]}, save_total_limit=1, **options)
    trainer.train()
    assert seen == [
        (str(run / "checkpoint-1"), ["checkpoint-1"]),
        (str(run / "checkpoint-2"), ["checkpoint-2"]),
        (str(run / "checkpoint-2"), ["checkpoint-2", "checkpoint-3"]),
        (str(run / "checkpoint-2"), ["checkpoint-2", "checkpoint-4"]),
    ]
    assert not (run / files.STAGING).exists()


def test_a_checkpoint_is_pushed_from_where_it_stays(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = []

    def push(self: Any, folder: str, options: Any) -> Future[None]:
        pushed.append((folder, files.why_unusable(Path(folder))))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    monkeypatch.setattr(PushesExperts, "_push_in_background", push)
    trainer = make_trainer(max_steps=1, save_strategy="steps", save_steps=1)
    trainer.args.push_to_hub = True
    trainer.train()
    assert pushed == [(str(tmp_path / "run" / "checkpoint-1"), None)]


def test_an_interrupted_save_leaves_no_model_and_no_rest(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer()
    with monkeypatch.context() as patch:
        patch.setattr(trainer.processing_class, "save_pretrained", lambda folder: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            trainer.save_model(str(tmp_path / "expert"))
    assert os.listdir(tmp_path / "expert") == []
    trainer.save_model(str(tmp_path / "expert"))
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} < set(os.listdir(tmp_path / "expert"))
    assert not (tmp_path / "expert" / files.STAGING).exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no right to mount a file system: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path, left: int) -> None:
    """Leave `left` bytes on the disk."""
    (disk / "filler").write_bytes(b"\0" * (shutil.disk_usage(disk).free - left))


def test_a_full_disk_leaves_the_last_checkpoint_usable(make_trainer: MakeTrainer, small_disk: Path) -> None:
    run = small_disk / "run"
    options = {"output_dir": str(run), "save_strategy": "steps", "save_steps": 1, "logging_steps": 100}
    trainer = make_trainer(max_steps=2, learning_curve=False, **options)
    trainer.train()
    used = sum(path.stat().st_size for path in (run / "checkpoint-2").iterdir())
    trainer.state.global_step = 3
    for left in range(0, used, 4096):  # full at every file, one after the other
        fill(small_disk, left)
        with pytest.raises(
            OSError, match=r"checkpoint-3 could not be saved.*checkpoint-2\. Free some space"
        ) as failure:
            trainer._save_checkpoint(trainer.model, None)
        assert failure.value.errno == errno.ENOSPC
        try:
            trainer.save_model(str(small_disk / "expert"))
        except OSError as error:
            assert "expert could not be saved" in str(error)
            assert not (small_disk / "expert" / "adapter_config.json").exists()
        else:  # without optimizer it needs less
            load_file(small_disk / "expert" / "adapter_model.safetensors")
        shutil.rmtree(small_disk / "expert", ignore_errors=True)
        os.unlink(small_disk / "filler")
        assert {path.name for path in run.iterdir() if path.is_dir()} == {"checkpoint-1", "checkpoint-2"}
        assert files.newest_usable(run) == (run / "checkpoint-2", {})
    resumed = make_trainer(max_steps=3, learning_curve=False, **options)
    assert resumed.train(resume_from_checkpoint=True).global_step == 3


def test_errors_that_are_not_the_disks_are_not_renamed(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(max_steps=1, save_strategy="steps", save_steps=1)
    monkeypatch.setattr(trainer, "_save_rng_state", lambda folder: {}["no such key"])
    with pytest.raises(KeyError):
        trainer.train()
    assert files.checkpoints(tmp_path / "run") == [] and not (tmp_path / "run" / files.STAGING).exists()
