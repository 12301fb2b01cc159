"""Training stops before anything that is not finite touches the offsets, and leaves the batch to look at."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from peft_svf.trainers import NonFiniteLossError, SVFPolicyGradientTrainer
from peft_svf.trainers.guards.finite_gradients import FiniteGradientsCallback
from peft_svf.trainers.guards.finite_loss import StopsOnNonFinite
from peft_svf.trainers.guards.non_finite_batch import save_batch


MakeTrainer = Callable[..., SVFPolicyGradientTrainer]


def offsets(trainer: SVFPolicyGradientTrainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


def read(folder: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert sorted(path.name for path in Path(folder).iterdir()) == ["process-0.json", "process-0.safetensors"]
    facts = json.loads((Path(folder) / "process-0.json").read_text(), parse_constant=refuse)
    return load_file(Path(folder) / "process-0.safetensors"), facts


class AfterEachStep(TrainerCallback):
    def __init__(self) -> None:
        self.offsets: list[Tensor] = []
        self.trainer: SVFPolicyGradientTrainer

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.offsets.append(offsets(self.trainer).clone())


def watched(make_trainer: MakeTrainer, **options: Any) -> tuple[SVFPolicyGradientTrainer, AfterEachStep]:
    callback = AfterEachStep()
    callback.trainer = make_trainer({"callbacks": [callback]}, lr_scheduler_type="constant", **options)
    return callback.trainer, callback


def test_a_learning_rate_after_which_nothing_can_be_sampled(make_trainer: MakeTrainer) -> None:
    trainer, after = watched(make_trainer, learning_rate=1e30, max_steps=4)
    with pytest.raises(
        NonFiniteLossError, match=r"Step 2: the logits are not finite.*lower `learning_rate`"
    ) as caught:
        trainer.train()
    assert caught.value.step == 1 and caught.value.folder == f"{trainer.args.output_dir}/non_finite_batch-1"
    _, facts = read(caught.value.folder)
    assert len(facts["answers"]) == 16 and all("= ?" in answer["prompt"] for answer in facts["answers"])
    assert len(after.offsets) == 1 and torch.equal(offsets(trainer), after.offsets[0])
    assert not any(layer.merged for layer in trainer._adapter_layers)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_learning_rate_after_which_the_gradient_overflows(make_trainer: MakeTrainer, max_grad_norm: float) -> None:
    trainer, after = watched(
        make_trainer,
        learning_rate=1e18,
        max_steps=4,
        max_grad_norm=max_grad_norm,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
    )
    with pytest.raises(NonFiniteLossError, match=r"Step 2: the gradient is not finite.*2 micro-batches") as caught:
        trainer.train()
    tensors, facts = read(caught.value.folder)
    assert [len(own["answers"]) for own in facts["micro_batches"]] == [8, 8]
    for i, own in enumerate(facts["micro_batches"]):
        ids, mask = tensors[f"{i}.completion_ids"], tensors[f"{i}.completion_mask"].bool()
        texts = [trainer.processing_class.decode(row[kept]) for row, kept in zip(ids, mask, strict=True)]
        assert texts == [answer["completion"] for answer in own["answers"]]
        rewards = [answer["rewards"]["even_digits"] for answer in own["answers"]]
        assert rewards == tensors[f"{i}.rewards"].flatten().tolist()
    assert len(after.offsets) == 1 and torch.equal(offsets(trainer), after.offsets[0])


def test_finite_rewards_that_are_too_large_for_the_loss(make_trainer: MakeTrainer) -> None:
    def huge(completions: list[Any], index: list[int], **kwargs: Any) -> list[float]:
        return [3e38 if i % 5 == 0 else -1.0 for i in index]

    trainer = make_trainer({"reward_funcs": huge}, max_steps=2, baseline="none")
    with pytest.raises(NonFiniteLossError, match=r"Step 1: the loss is not finite.*because of answers") as caught:
        trainer.train()
    tensors, facts = read(caught.value.folder)
    guilty = [row for row, answer in enumerate(facts["answers"]) if answer["rewards"]["huge"] > 1.0]
    sums = tensors["log_probs"].sum(1)
    assert guilty and facts["not_finite"] == [row for row in guilty if 3e38 * abs(float(sums[row])) > 3.4e38]
    assert f"answers {', '.join(map(str, facts['not_finite']))} of process 0" in str(caught.value)
    assert offsets(trainer).abs().max() == 0


def test_one_advantage_that_is_nan(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(max_steps=3, kl_coef=0.1)
    score = SVFPolicyGradientTrainer._generate_and_score_completions

    def poisoned(self: SVFPolicyGradientTrainer, inputs: Any) -> dict[str, Any]:
        output = score(self, inputs)
        if self.state.global_step == 1:
            output["advantages"][4] = torch.nan
        return output

    monkeypatch.setattr(SVFPolicyGradientTrainer, "_generate_and_score_completions", poisoned)
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.train()
    tensors, facts = read(caught.value.folder)
    [row] = tensors["advantages"].isnan().nonzero().flatten().tolist()
    assert facts["not_finite"] == [row] and facts["answers"][row]["advantage"] == "nan"
    assert tensors["kl"].shape == tensors["completion_ids"].shape and tensors["kl"].isfinite().all()
    assert caught.value.step == 1 and offsets(trainer).isfinite().all()


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
@pytest.mark.parametrize("training", [True, False])
def test_an_infinite_reward_names_its_function(
    make_trainer: MakeTrainer, tiny: SimpleNamespace, value: float, training: bool
) -> None:
    def divides_by_zero(completions: list[Any], **kwargs: Any) -> list[float]:
        return [1.0] * (len(completions) - 1) + [value]

    trainer = make_trainer({"reward_funcs": [tiny.reward, divides_by_zero]}, max_steps=1)
    message = "the reward of `divides_by_zero` is not finite. It is infinite for 1 of"
    with pytest.raises(NonFiniteLossError, match=message) as caught:
        trainer.train() if training else trainer.evaluate()
    _, facts = read(caught.value.folder)
    assert facts["answers"][-1]["rewards"]["divides_by_zero"] == str(value)
    assert facts["answers"][-1]["completion"][0]["role"] == "assistant"


def test_a_reward_that_is_nan_means_cannot_be_judged(make_trainer: MakeTrainer) -> None:
    def unsure(completions: list[Any], **kwargs: Any) -> list[float]:
        return [float("nan"), 1.0, *([-1.0] * (len(completions) - 2))]

    trainer = make_trainer({"reward_funcs": unsure}, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2 and offsets(trainer).isfinite().all()


def test_a_batch_that_cannot_be_saved_does_not_hide_the_error(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        {"reward_funcs": lambda completions, **kwargs: [float("inf")] * len(completions)}, max_steps=1
    )
    (Path(trainer.args.output_dir) / "non_finite_batch-0").write_text("a file where the folder should be")
    with pytest.raises(NonFiniteLossError, match=r"could not be saved.*File exists"):
        trainer.train()


def test_a_file_that_cannot_be_written_whole_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:10])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        save_batch(str(tmp_path), 0, {"ids": torch.arange(9)}, {})
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".partial"]


@pytest.mark.parametrize(("scale", "stops"), [(65536.0, False), (1.0, False), (0.5, True), (None, True)])
def test_overflow_that_the_scaler_of_float16_handles_is_left_to_it(scale: float | None, stops: bool) -> None:
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    accelerator = SimpleNamespace(scaler=scaler, device=torch.device("cpu"), gather=lambda tensor: tensor)
    calls: list[None] = []
    callback: Any = FiniteGradientsCallback(accelerator, lambda: calls.append(None))  # type: ignore[arg-type]
    model = torch.nn.Linear(3, 3)
    if scaler is not None:
        scaler.scale(torch.zeros(1))  # the scale exists from the first loss on
    model.weight.grad = torch.full((3, 3), 1e30)  # its square is infinite, it is not
    callback.on_pre_optimizer_step(None, None, None, model=model)
    assert not calls
    model.weight.grad[1, 2] = torch.inf
    callback.on_pre_optimizer_step(None, None, None, model=model)
    assert bool(calls) == stops


def test_a_healthy_run_is_the_same_to_the_bit(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"max_steps": 4, "kl_coef": 0.1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}
    with caplog.at_level(logging.WARNING, logger="peft_svf"):
        guarded = make_trainer(collapse_patience=1, **options)
        guarded.train()
    assert not caplog.records and not list(Path(guarded.args.output_dir).glob("non_finite*"))
    plain = make_trainer(zero_variance_patience=0, collapse_patience=0, **options)
    for name in ("compute_loss", "_calculate_rewards", "_generate_single_turn", "_generate_and_score_completions"):
        monkeypatch.delattr(StopsOnNonFinite, name)
    plain.remove_callback(FiniteGradientsCallback)
    plain.train()
    assert offsets(plain).abs().max() > 0 and torch.equal(offsets(guarded), offsets(plain))


def test_what_is_no_plain_data_is_named(tmp_path: Path) -> None:
    save_batch(str(tmp_path), 0, {"ids": torch.arange(9)[::2]}, {"prompt": [{"image": Path("cat.png")}], "r": [1.5]})
    tensors, facts = read(str(tmp_path))
    assert facts == {"prompt": [{"image": "cat.png"}], "r": [1.5]} and tensors["ids"].tolist() == [0, 2, 4, 6, 8]
