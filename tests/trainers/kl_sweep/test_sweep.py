"""A sweep over KL coefficients against fresh trainers, interrupted at any point, and what it leaves on the disk."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import TrainerCallback

from peft_svf.trainers import SVFPolicyGradientTrainer
from peft_svf.trainers.kl_sweep.fresh_trainer import remember
from peft_svf.trainers.kl_sweep.record import KLRun, KLSweepResult, choose


MakeTrainer = Callable[..., SVFPolicyGradientTrainer]
OPTIONS = {
    "max_steps": 4,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "learning_rate": 0.1,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 1,
    "logging_steps": 2,
    "learning_curve": False,
}
NOT_NUMBERS = ("runtime", "preparation_time", "per_second", "step_time", "flos", "tokens_per_second")


def even_share(completions: list[Any], **kwargs: Any) -> list[float]:
    """The share of even numbers among the words: rises from its first steps, so that there is something to choose."""
    words = [completion[0]["content"].split() for completion in completions]
    return [2.0 * sum(w.isdigit() and int(w) % 2 == 0 for w in ws) / max(len(ws), 1) - 1.0 for ws in words]


class Interrupt(TrainerCallback):
    """Raises at the end of a step, or of the micro-batch after it, of the run with one coefficient."""

    def __init__(self, kl_coef: float, step: int, where: str = "on_step_end") -> None:
        self.when = SimpleNamespace(kl_coef=kl_coef, step=step, where=where)  # an object of ours is not set back

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.maybe(args, state, "on_step_end")

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.maybe(args, state, "on_substep_end")

    def maybe(self, args: Any, state: Any, where: str) -> None:
        now = SimpleNamespace(kl_coef=args.kl_coef, step=state.global_step, where=where)
        if now == self.when:
            raise KeyboardInterrupt


class Exhausted(TrainerCallback):
    """Stops training at its fourth evaluation, which one run does not reach."""

    def __init__(self) -> None:
        self.evaluations: list[int] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluations.append(state.global_step)
        control.should_training_stop = len(self.evaluations) > 3


class Flaky:
    """A reward with a script for evaluations, by coefficient: `scores[kl_coef][k]` after 2 k steps."""

    __name__ = "flaky"

    def __init__(self, scores: dict[float, list[float]]) -> None:
        self.scores = scores
        self.trainer: SVFPolicyGradientTrainer

    def __call__(self, completions: list[Any], index: list[int], **kwargs: Any) -> list[float]:
        if self.trainer.model.training:
            return [1.0 if i % 2 else -1.0 for i in index]
        score = self.scores[self.trainer.args.kl_coef][self.trainer.state.global_step // 2]
        return [score] * len(completions)


@pytest.fixture
def make_sweep(make_trainer: MakeTrainer) -> MakeTrainer:
    def make(arguments: dict[str, Any] | None = None, **options: Any) -> SVFPolicyGradientTrainer:
        return make_trainer({"reward_funcs": even_share, **(arguments or {})}, **{**OPTIONS, **options})

    return make


@dataclasses.dataclass(frozen=True)
class Whole:
    """What a sweep over 0 and 0.3 that nothing interrupts comes to."""

    result: KLSweepResult
    offsets: torch.Tensor
    logs: dict[str, list[dict[str, Any]]]


@pytest.fixture
def whole(make_sweep: MakeTrainer, tmp_path: Path, whole_sweeps: list[Whole]) -> Whole:
    """The same for all tests, so it runs once."""
    if not whole_sweeps:
        trainer = make_sweep(output_dir=str(tmp_path / "whole"))
        result = trainer.sweep_kl([0.0, 0.3])
        whole_sweeps.append(Whole(result, offsets(trainer).clone(), logs_of_runs(tmp_path / "whole")))
    return whole_sweeps[0]


@pytest.fixture(scope="module")
def whole_sweeps() -> list[Whole]:
    """Keeps the one; the trainers' own fixtures are of a single test."""
    return []


def scripted(make_sweep: MakeTrainer, scores: dict[float, list[float]], **options: Any) -> SVFPolicyGradientTrainer:
    reward = Flaky(scores)
    trainer = make_sweep({"reward_funcs": reward}, **options)
    reward.trainer = trainer
    return trainer


def offsets(trainer: SVFPolicyGradientTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


def numbers(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The log without clocks."""
    return [{k: v for k, v in entry.items() if not any(name in k for name in NOT_NUMBERS)} for entry in log_history]


def logs_of_runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    states = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("kl-*/trainer_state.json")}
    return {name: numbers(state["log_history"]) for name, state in states.items()}


def checkpoints(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.glob("kl-*/checkpoint-*"))


# -- the runs --------------------------------------------------------------------------------------------------------
def test_every_run_is_that_of_a_fresh_trainer_bit_for_bit(make_sweep: MakeTrainer, tmp_path: Path) -> None:
    """Also after a training of the same trainer that was interrupted between two micro-batches."""
    interrupt = Interrupt(0.7, 3, "on_substep_end")
    swept = make_sweep(
        {"callbacks": [Exhausted(), interrupt]},
        output_dir=str(tmp_path / "sweep"),
        kl_coef=0.7,
        steps_per_generation=2,
    )
    with pytest.raises(KeyboardInterrupt):
        swept.train()
    assert swept._step % 2 and swept._buffered_inputs is not None
    coefficients = [0.0, 0.3]
    best = {}
    result = swept.sweep_kl(coefficients)
    for kl_coef in coefficients:
        fresh = make_sweep(
            {"callbacks": [Exhausted()]},
            output_dir=str(tmp_path / f"fresh-{kl_coef:g}"),
            kl_coef=kl_coef,
            steps_per_generation=2,
        )
        fresh.train()
        best[kl_coef] = offsets(fresh)
        assert logs_of_runs(tmp_path / "sweep")[f"kl-{kl_coef:g}"] == numbers(fresh.state.log_history)
        (run,) = [run for run in result.runs if run.kl_coef == kl_coef]
        assert run.score == fresh.state.best_metric and run.base_score == fresh.base_eval_reward
    assert len({str(log) for log in logs_of_runs(tmp_path / "sweep").values()}) == 2, "the coefficient has to matter"
    assert result.winner is not None and torch.equal(offsets(swept), best[result.winner])


@pytest.mark.parametrize("step", [1, 3])
def test_an_interrupted_sweep_continues_to_the_same_numbers(
    make_sweep: MakeTrainer, tmp_path: Path, whole: Whole, step: int
) -> None:
    first = make_sweep({"callbacks": [Interrupt(0.3, step)]}, output_dir=str(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt):
        first.sweep_kl([0.0, 0.3])
    assert (first.args.kl_coef, first.args.output_dir) == (0.0, str(tmp_path / "run"))
    record = json.loads((tmp_path / "run" / "kl_sweep.json").read_text())
    assert [run["kl_coef"] for run in record["runs"]] == [0.0] and not record["chosen"]
    finished = (tmp_path / "run" / "kl-0" / "trainer_state.json").stat().st_mtime_ns

    second = make_sweep(output_dir=str(tmp_path / "run"))
    result = second.sweep_kl([0.0, 0.3])
    assert [dataclasses.replace(run, seconds=0.0) for run in result.runs] == [
        dataclasses.replace(run, seconds=0.0) for run in whole.result.runs
    ]
    assert result.winner == whole.result.winner and torch.equal(offsets(second), whole.offsets)
    assert (tmp_path / "run" / "kl-0" / "trainer_state.json").stat().st_mtime_ns == finished, "was not run again"
    assert logs_of_runs(tmp_path / "run") == whole.logs


def test_an_interrupted_sweep_continues_on_the_same_trainer(
    make_sweep: MakeTrainer, tmp_path: Path, whole: Whole
) -> None:
    interrupt = Interrupt(0.3, 3)
    trainer = make_sweep({"callbacks": [interrupt]})
    with pytest.raises(KeyboardInterrupt):
        trainer.sweep_kl([0.0, 0.3])
    interrupt.when.step = 100
    result = trainer.sweep_kl([0.0, 0.3])
    assert [run.score for run in result.runs] == [run.score for run in whole.result.runs]
    assert logs_of_runs(tmp_path / "run") == whole.logs


def test_a_sweep_after_trainings_starts_where_the_trainer_did(make_sweep: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_sweep()
    trainer.train()
    trainer.train()
    swept = trainer.sweep_kl([0.0])
    assert make_sweep().sweep_kl([0.0]).runs == swept.runs, "the record is that of the same start"
    fresh = make_sweep(output_dir=str(tmp_path / "fresh"))
    assert fresh.sweep_kl([0.0]).runs[0].score == swept.runs[0].score


# -- the choice ------------------------------------------------------------------------------------------------------
def test_the_winner_is_loaded_saved_and_the_only_one_kept(make_sweep: MakeTrainer, tiny: Any, tmp_path: Path) -> None:
    scores = {0.0: [0.5, 0.6, 0.7], 0.1: [0.5, 0.9, 0.8], 0.2: [0.5, 0.4, 0.4]}
    trainer = scripted(make_sweep, scores)
    result = trainer.sweep_kl([0.2, 0.0, 0.1])
    assert [(run.kl_coef, run.score, run.best_step) for run in result.runs] == [
        (0.0, pytest.approx(0.7), 4), (0.1, pytest.approx(0.9), 2), (0.2, pytest.approx(0.5), 0),
    ]  # fmt: skip
    assert result.winner == trainer.args.kl_coef == 0.1 and not trainer.best_is_base
    assert trainer.base_eval_reward == pytest.approx(0.5) and trainer.state.best_global_step == 2
    assert trainer.gain_over_base is not None and trainer.gain_over_base.gain == pytest.approx(0.4)
    assert checkpoints(tmp_path / "run") == ["kl-0.1/checkpoint-2", "kl-0.1/checkpoint-4"]
    assert json.loads((tmp_path / "run" / "kl_sweep.json").read_text())["winner"] == 0.1
    loaded = PeftModel.from_pretrained(tiny.model(), tmp_path / "run")
    assert torch.equal(
        torch.cat([p.flatten() for n, p in loaded.named_parameters() if "svf_offset" in n]), offsets(trainer)
    )
    assert offsets(trainer).abs().max() > 0
    assert "0.1" in (tmp_path / "run" / "README.md").read_text()


def test_coefficients_of_an_earlier_call_stay_candidates(make_sweep: MakeTrainer, tmp_path: Path) -> None:
    scores = {0.0: [0.5, 0.9, 0.7], 0.1: [0.5, 0.6, 0.8], 0.2: [0.5, 0.4, 0.4]}
    first = scripted(make_sweep, scores)
    first.sweep_kl([0.0, 0.1])
    second = scripted(make_sweep, scores)
    result = second.sweep_kl([0.2])
    assert result.winner == 0.0 and [run.kl_coef for run in result.runs] == [0.0, 0.1, 0.2]
    assert torch.equal(offsets(second), offsets(first))


def test_a_sweep_that_gains_nothing_ends_at_the_base_and_saves_nothing(
    make_sweep: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = scripted(make_sweep, {0.0: [0.5, 0.5, 0.5], 0.1: [0.5, 0.1, 0.2]})
    with caplog.at_level(logging.WARNING):
        result = trainer.sweep_kl([0.0, 0.1])
    assert result.winner is None and trainer.best_is_base and trainer.args.kl_coef == 0.0
    assert offsets(trainer).abs().max() == 0 and trainer.base_eval_reward == 0.5
    assert not list((tmp_path / "run").rglob("adapter_model*")) and "nothing is saved" in caplog.text


def run(kl_coef: float, score: float, best_step: int = 2) -> KLRun:
    return KLRun(kl_coef, score, None, None, 0.5, best_step, 1.0)


@pytest.mark.parametrize(
    ("runs", "greater_is_better", "winner"),
    [
        ([run(0.0, 0.7), run(0.1, 0.9), run(0.2, 0.8)], True, 0.1),
        ([run(0.0, 0.7), run(0.1, 0.9), run(0.2, 0.8)], False, 0.0),
        ([run(0.0, 0.9), run(0.2, 0.9), run(0.1, 0.9)], True, 0.2),
        ([run(0.0, 0.9), run(0.2, 0.5, best_step=0)], False, 0.0),
        ([run(0.0, 0.5, best_step=0), run(0.2, 0.5, best_step=0)], True, None),
    ],
    ids=["best", "lowest", "of equals closest to the base", "not the start", "the base"],
)
def test_choice(runs: list[KLRun], greater_is_better: bool, winner: float | None) -> None:
    chosen = choose(runs, greater_is_better)
    assert (chosen and chosen.kl_coef) == winner


def test_results_print_as_a_table() -> None:
    runs = (dataclasses.replace(run(0.0, 0.7), low=0.6, high=0.8), run(0.1, 0.9))
    lines = str(KLSweepResult("eval_reward", runs, 0.1)).splitlines()
    assert len(lines) == 4 and "eval_reward" in lines[0] and "0.5000" in lines[1]
    assert "[0.6000, 0.8000]" in lines[2] and not lines[2].endswith("*") and lines[3].endswith("*")


# -- bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("coefficients", "message"),
    [([], "is empty"), ([0.1, -0.1], "remove -0.1"), ([0.1, float("nan")], "remove nan"), ([0.1, 0.1], "duplicates")],
)
def test_impossible_coefficients_are_refused(make_sweep: MakeTrainer, coefficients: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_sweep().sweep_kl(coefficients)


def test_a_sweep_needs_a_validation_score_and_its_own_optimizer(make_sweep: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="load_best_model_at_end=True"):
        make_sweep(load_best_model_at_end=False).sweep_kl()
    with pytest.raises(ValueError, match="optimizer_cls_and_kwargs"):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
        make_sweep({"optimizers": (optimizer, None)}).sweep_kl()


@pytest.mark.parametrize(
    ("arguments", "options", "name"),
    [
        ({}, {"learning_rate": 0.2}, "learning_rate"),
        ({}, {"max_steps": 6}, "max_steps"),
        ({"train": 32}, {}, "train_prompts"),
    ],
)
def test_results_of_other_settings_are_not_continued(
    make_sweep: MakeTrainer, tiny: Any, arguments: dict[str, Any], options: dict[str, Any], name: str
) -> None:
    scripted(make_sweep, {0.0: [0.5, 0.6, 0.7]}).sweep_kl([0.0])
    datasets = {"train_dataset": tiny.prompts(arguments["train"])} if arguments else {}
    with pytest.raises(ValueError, match=f"`{name}` = .* now it is"):
        make_sweep({"reward_funcs": Flaky({}), **datasets}, **options).sweep_kl([0.0])


def test_starting_over_deletes_what_was_recorded(make_sweep: MakeTrainer, tmp_path: Path) -> None:
    scripted(make_sweep, {0.0: [0.5, 0.6, 0.7]}).sweep_kl([0.0])
    other = scripted(make_sweep, {0.1: [0.5, 0.6, 0.7]}, learning_rate=0.2)
    result = other.sweep_kl([0.1], resume=False)
    assert [run.kl_coef for run in result.runs] == [0.1] and "kl-0/" not in str(checkpoints(tmp_path / "run"))


def test_checkpoints_of_unknown_origin_are_refused(make_sweep: MakeTrainer, tmp_path: Path) -> None:
    scripted(make_sweep, {0.0: [0.5, 0.6, 0.7]}).sweep_kl([0.0])
    (tmp_path / "run" / "kl_sweep.json").unlink()
    with pytest.raises(ValueError, match=r"kl-0 but no kl_sweep\.json"):
        make_sweep().sweep_kl([0.0])
    (tmp_path / "run" / "kl_sweep.json").write_text("{")
    with pytest.raises(ValueError, match="is not a record of a KL sweep"):
        make_sweep().sweep_kl([0.0])


# -- a trainer set back ----------------------------------------------------------------------------------------------
def test_containers_are_set_back_in_place() -> None:
    metrics: dict[str, Any] = {"train": defaultdict(list, reward=[1.0]), "seen": {1, 2}, "last": deque([1], maxlen=2)}
    tensor = torch.ones(2)
    attributes: dict[str, Any] = {"metrics": metrics, "tensor": tensor, "step": 3, "object": object()}
    inner = metrics["train"]
    refills = remember(attributes)
    metrics["train"]["reward"].append(2.0), metrics["train"]["kl"].append(3.0), metrics["seen"].clear()
    metrics["last"].extend([5, 6]), tensor.zero_()
    assert set(refills) == {"metrics", "tensor", "step"}
    restored = {name: refill() for name, refill in refills.items()}
    assert restored["metrics"] is metrics and metrics["train"] is inner and dict(inner) == {"reward": [1.0]}
    assert metrics["seen"] == {1, 2} and list(metrics["last"]) == [1] and metrics["last"].maxlen == 2
    assert restored["tensor"] is tensor and tensor.tolist() == [1.0, 1.0]
