"""The trainer against a loss written by hand, and what training leaves behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from torch import Tensor

from peft_svf import SVFConfig
from peft_svf.trainers import SVFPolicyGradientTrainer
from peft_svf.trainers.loss.scoring import adapters_disabled


MakeTrainer = Callable[..., SVFPolicyGradientTrainer]
ESTIMATORS = ["exact", "exact_forward", "k1_reward", "k3"]


def trainable(trainer: SVFPolicyGradientTrainer) -> dict[str, Tensor]:
    return {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}


def frozen_copy(trainer: SVFPolicyGradientTrainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}


def assert_base_unchanged(trainer: SVFPolicyGradientTrainer, before: dict[str, Tensor]) -> None:
    after = frozen_copy(trainer)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def rollout(trainer: SVFPolicyGradientTrainer, n: int = 16) -> dict[str, Any]:
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    repeats = trainer.num_generations
    rows = [trainer.train_dataset[i // repeats] for i in range(n)]
    return trainer._generate_and_score_completions(rows)


def hand_written_loss(
    trainer: SVFPolicyGradientTrainer,
    batch: dict[str, Any],
    rewards: Tensor,
    estimator: str,
    coef: float,
    baseline: str,
) -> Tensor:
    """Eq. 1 of the paper, one unpadded answer at a time, through the model's own logits."""
    model, n = trainer.model, len(rewards)
    terms = []
    for i in range(n):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        answer = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
        ids = torch.cat([prompt, answer]).unsqueeze(0)
        p = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].div(trainer.temperature).log_softmax(-1)
        with torch.no_grad(), model.disable_adapter():
            q = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].div(trainer.temperature).log_softmax(-1)
        index = torch.arange(len(answer))
        p_taken, q_taken = p[index, answer], q[index, answer]
        group = list(range(n))
        if baseline == "group":
            size = trainer.num_generations
            group = group[i // size * size : i // size * size + size]
        others = [rewards[j] for j in group if j != i]
        advantage = rewards[i] - (0.0 if baseline == "none" else sum(others) / len(others))
        if estimator == "k1_reward":
            advantage = advantage - coef * (p_taken - q_taken).sum().detach()
        kl = {
            "exact": (p.exp() * (p - q)).sum(),
            "exact_forward": torch.nn.functional.kl_div(p, q, log_target=True, reduction="sum"),  # the released code
            "k3": ((q_taken - p_taken).exp() - (q_taken - p_taken) - 1).sum(),
            "k1_reward": torch.zeros(()),
        }[estimator]
        terms.append(-advantage * p_taken.sum() + coef * kl)
    return torch.stack(terms).mean()


@pytest.mark.parametrize("baseline", ["none", "batch", "group"])
@pytest.mark.parametrize(("estimator", "coef"), [("exact", 0.0), *((name, 0.3) for name in ESTIMATORS)])
def test_gradient_is_that_of_the_hand_written_loss(
    make_trainer: MakeTrainer, tiny: SimpleNamespace, estimator: str, coef: float, baseline: str
) -> None:
    num_generations = 4 if baseline == "group" else 1
    trainer = make_trainer(
        kl_estimator=estimator, kl_coef=coef, baseline=baseline, num_generations=num_generations, temperature=0.8
    )
    tiny.randomize_offsets(trainer.model)
    batch = rollout(trainer)
    parameters = list(trainable(trainer).values())
    ours = torch.autograd.grad(trainer._compute_loss(trainer.model, batch), parameters)
    answers = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    rewards = torch.tensor(tiny.reward([[{"content": answer}] for answer in answers]))
    assert len(rewards.unique()) == 2, "the batch has to contain good and bad answers"
    loss = hand_written_loss(trainer, batch, rewards, estimator, coef, baseline)
    by_hand = torch.autograd.grad(loss, parameters)
    error = torch.cat([(a - b).flatten() for a, b in zip(ours, by_hand, strict=True)]).norm()
    assert error / torch.cat([b.flatten() for b in by_hand]).norm() < 1e-5


def test_tokens_of_a_tool_are_not_scored(make_trainer: MakeTrainer, tiny: SimpleNamespace) -> None:
    trainer = make_trainer(kl_coef=0.3)
    tiny.randomize_offsets(trainer.model)
    batch = rollout(trainer)
    cut = {**batch, "tool_mask": batch["completion_mask"].clone()}
    cut["tool_mask"][:, 3:] = 0
    short = {**batch, "completion_mask": cut["tool_mask"]}
    # Causal: what the tool wrote afterwards changes nothing before it.
    torch.testing.assert_close(
        trainer._compute_loss(trainer.model, cut), trainer._compute_loss(trainer.model, short), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_is_zero_before_the_first_step(
    make_trainer: MakeTrainer, tiny: SimpleNamespace, estimator: str, dtype: torch.dtype
) -> None:
    trainer = make_trainer({"model": tiny.model(dtype)}, kl_coef=0.3, kl_estimator=estimator)
    trainer._compute_loss(trainer.model, rollout(trainer))
    assert trainer._metrics["train"]["kl"] == [0.0] and trainer._metrics["train"]["kl_sequence"] == [0.0]


def test_offsets_stay_float32_on_a_bfloat16_base(make_trainer: MakeTrainer, tiny: SimpleNamespace) -> None:
    trainer = make_trainer({"model": tiny.model(torch.bfloat16)}, max_steps=2, bf16=True)
    base = frozen_copy(trainer)
    trainer.train()
    assert {p.dtype for p in trainable(trainer).values()} == {torch.float32}
    assert any(p.abs().max() > 0 for p in trainable(trainer).values())
    assert {p.dtype for p in base.values()} == {torch.bfloat16}
    assert_base_unchanged(trainer, base)


def test_what_trl_casts_to_bfloat16_comes_back_exactly(make_trainer: MakeTrainer, tiny: SimpleNamespace) -> None:
    """TRL casts what is trainable on a quantized model: here a plain one that says it is."""
    from peft import get_peft_model

    model = get_peft_model(tiny.model(), SVFConfig())
    tiny.randomize_offsets(model)
    given = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model.get_base_model().is_loaded_in_4bit = True
    trainer = make_trainer({"model": model, "peft_config": None})
    assert all(torch.equal(p, given[name]) and p.dtype == torch.float32 for name, p in trainable(trainer).items())


def test_training_raises_the_reward_and_changes_only_offsets(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        max_steps=30, learning_rate=0.1, per_device_train_batch_size=64, kl_coef=0.01, steps_per_generation=1
    )
    base = frozen_copy(trainer)
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.5
    assert all(p.abs().max() > 0 for p in trainable(trainer).values())
    assert all("svf_offset" in name for name in trainable(trainer))
    assert_base_unchanged(trainer, base)
    assert {"policy_loss", "entropy", "kl", "kl_sequence"} <= trainer.state.log_history[0].keys()
    assert "frac_reward_zero_std" not in trainer.state.log_history[0]


def test_gradient_accumulation_gives_the_step_of_the_whole_batch(make_trainer: MakeTrainer) -> None:
    after = []
    for per_device, accumulation in [(16, 1), (4, 4)]:
        trainer = make_trainer(
            max_steps=1, per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation, kl_coef=0.1
        )
        trainer.train()
        after.append(torch.cat([p.detach().flatten() for p in trainable(trainer).values()]))
    torch.testing.assert_close(after[0], after[1], rtol=1e-3, atol=1e-5)


def test_answers_come_from_merged_weights_that_are_put_back(
    make_trainer: MakeTrainer, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer()
    tiny.randomize_offsets(trainer.model)
    base = frozen_copy(trainer)
    layers = trainer._adapter_layers
    merged = []
    generate = trainer.model.generate

    def spy(*args: Any, **kwargs: Any) -> Any:
        merged.append(all(layer.merged for layer in layers))
        return generate(*args, **kwargs)

    monkeypatch.setattr(trainer.model, "generate", spy)
    rollout(trainer)
    assert merged == [True]
    assert not any(layer.merged for layer in layers)
    assert_base_unchanged(trainer, base)


def test_weights_are_put_back_when_generation_raises(
    make_trainer: MakeTrainer, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer()
    tiny.randomize_offsets(trainer.model)
    base = frozen_copy(trainer)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(trainer.model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        rollout(trainer)
    assert not any(layer.merged for layer in trainer._adapter_layers)
    assert_base_unchanged(trainer, base)


def test_merged_weights_are_never_scored(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    batch = rollout(trainer)
    trainer.model.merge_adapter()
    with pytest.raises(RuntimeError, match="unmerge_adapter"):
        trainer._compute_loss(trainer.model, batch)


def test_reference_forward_leaves_adapters_enabled_and_trainable_when_it_raises(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(kl_coef=0.1)
    names = list(trainable(trainer))
    with pytest.raises(RuntimeError, match="stop"), adapters_disabled(trainer.model):
        assert all(layer.disable_adapters for layer in trainer._adapter_layers)
        raise RuntimeError("stop")
    assert not any(layer.disable_adapters for layer in trainer._adapter_layers)
    assert list(trainable(trainer)) == names


def test_what_was_frozen_stays_frozen_when_the_reference_is_scored(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(kl_coef=0.1)
    frozen, *others = trainable(trainer)
    trainable(trainer)[frozen].requires_grad_(False)
    trainer._compute_loss(trainer.model, rollout(trainer)).backward()
    assert list(trainable(trainer)) == others


def test_reference_is_the_base_model_also_for_other_trained_modules(
    make_trainer: MakeTrainer, tiny: SimpleNamespace
) -> None:
    trainer = make_trainer({"peft_config": SVFConfig(modules_to_save=["norm"])}, kl_coef=0.1)
    tiny.randomize_offsets(trainer.model)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), adapters_disabled(trainer.model):
        found = trainer.model(input_ids=ids).logits
    assert torch.equal(found, tiny.model()(input_ids=ids).logits)


def test_a_kl_from_a_base_model_whose_output_layer_is_trained_is_refused(make_trainer: MakeTrainer) -> None:
    """Its scores would be those of the trained output layer."""
    arguments = {"peft_config": SVFConfig(modules_to_save=["lm_head"])}
    with pytest.raises(ValueError, match="leave it out of `modules_to_save`"):
        make_trainer(arguments, kl_coef=0.1)
    trainer = make_trainer(arguments)
    trainer.args.kl_coef = 0.1  # as a sweep does
    with pytest.raises(ValueError, match="leave it out of `modules_to_save`"):
        trainer._compute_loss(trainer.model, rollout(trainer))


def test_gradient_checkpointing_gives_the_same_gradient(make_trainer: MakeTrainer, tiny: SimpleNamespace) -> None:
    gradients = []
    for checkpointing in [False, True]:
        trainer = make_trainer(kl_coef=0.3, gradient_checkpointing=checkpointing, max_steps=1)
        tiny.randomize_offsets(trainer.model)
        torch.manual_seed(0)
        batch = rollout(trainer)
        if checkpointing:
            trainer.model.gradient_checkpointing_enable()
        loss = trainer._compute_loss(trainer.model, batch)
        gradients.append(torch.autograd.grad(loss, list(trainable(trainer).values())))
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-5, atol=1e-6)


def test_a_model_with_an_adapter_of_its_own_is_trained(make_trainer: MakeTrainer, tiny: SimpleNamespace) -> None:
    from peft import get_peft_model

    model = get_peft_model(tiny.model(), SVFConfig())
    trainer = make_trainer({"model": model, "peft_config": None}, max_steps=1)
    trainer.train()
    assert list(model.peft_config) == ["default"]
    assert any(p.abs().max() > 0 for p in model.parameters() if p.requires_grad)


def test_unjudged_answers_get_no_gradient(make_trainer: MakeTrainer) -> None:
    def sometimes(completions: list[Any], index: list[int], **kwargs: Any) -> list[float | None]:
        return [None if i % 2 else float(i % 4 - 1) for i in index]

    trainer = make_trainer({"reward_funcs": sometimes})
    batch = rollout(trainer)
    judged = [-1.0 if i % 4 == 0 else 1.0 for i in range(0, 16, 2)]
    expected = [0.0 if i % 2 else judged[i // 2] - (sum(judged) - judged[i // 2]) / 7 for i in range(16)]
    torch.testing.assert_close(batch["advantages"], torch.tensor(expected))
    assert list(trainer._logs["advantages"]) == pytest.approx(expected)


@pytest.mark.parametrize("eval_on_start", [False, True])
def test_resuming_gives_the_numbers_of_an_uninterrupted_run(
    make_trainer: MakeTrainer, tmp_path: Any, eval_on_start: bool
) -> None:
    options = {
        "max_steps": 6,
        "kl_coef": 0.1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_on_start": eval_on_start,
    }
    whole = make_trainer(**options)
    whole.train()
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for name, parameter in trainable(whole).items():
        assert torch.equal(parameter, trainable(resumed)[name])
    assert whole.base_eval_reward == resumed.base_eval_reward


def test_arguments_of_the_caller_are_left_alone(make_trainer: MakeTrainer, tiny: SimpleNamespace) -> None:
    peft_config = SVFConfig()
    before = copy.deepcopy(peft_config.to_dict())
    make_trainer({"peft_config": peft_config})
    assert peft_config.to_dict() == before


def test_card_states_the_run_and_claims_no_result(make_trainer: MakeTrainer, tmp_path: Any) -> None:
    trainer = make_trainer(max_steps=1, save_strategy="steps", save_steps=1, kl_coef=0.25)
    trainer.train()
    card = (tmp_path / "run" / "checkpoint-1" / "README.md").read_text()
    offsets = sum(p.numel() for p in trainable(trainer).values())
    assert "even_digits" in card and "0.25" in card and str(offsets) in card
    assert "fine-tuned version of [None]" not in card and "GRPO" not in card
    trainer.save_model()  # PEFT rewrites the metadata of a card that it finds: ours comes last
    assert ModelCard.load(tmp_path / "run" / "README.md").data.tags == ["peft", "svf", "transformer2"]


def test_a_lora_adapter_is_trained_unmerged(make_trainer: MakeTrainer, tiny: SimpleNamespace) -> None:
    """For the ablations: unmerging LoRA drifts, so its answers come from the unmerged model."""
    from peft import LoraConfig

    trainer = make_trainer({"peft_config": LoraConfig(target_modules="all-linear", r=2)}, max_steps=1, kl_coef=0.1)
    base = frozen_copy(trainer)
    assert not trainer._generates_merged
    trainer.train()
    assert_base_unchanged(trainer, base)
