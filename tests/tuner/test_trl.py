"""SVF in the trainers of TRL, which know nothing of it: they train it, and they keep the right reference model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from peft_svf import SVFConfig
from peft_svf.playground import BANK_FOLDER, generate_problems


IDS = torch.randint(4, 100, (2, 12), generator=torch.Generator().manual_seed(0))
TEXTS = [("1+2=", "3.", "12."), ("4+4=", "8.", "4."), ("a b c ", "d e f.", "c b."), ("x ", "y z.", "q, r, s.")]
SFT_ROWS = [{"prompt": prompt, "completion": good} for prompt, good, _ in TEXTS]
DPO_ROWS = [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt, good, bad in TEXTS]
PROMPT_ROWS = [{"prompt": prompt} for prompt, _, _ in TEXTS]


def mean_character(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that differs between almost any two answers."""
    return [sum(map(ord, text)) / max(len(text), 1) / 128 for text in completions]


ROLLOUTS = {"num_generations": 4, "max_completion_length": 6, "beta": 0.1}
TRAINERS: dict[str, tuple[type[Trainer], type, list[dict], dict[str, Any], dict[str, Any]]] = {
    "SFT": (SFTTrainer, SFTConfig, SFT_ROWS, {}, {}),
    "DPO": (DPOTrainer, DPOConfig, DPO_ROWS, {}, {"beta": 0.1}),
    "GRPO": (GRPOTrainer, GRPOConfig, PROMPT_ROWS, {"reward_funcs": mean_character}, ROLLOUTS),
    "RLOO": (RLOOTrainer, RLOOConfig, PROMPT_ROWS, {"reward_funcs": mean_character}, ROLLOUTS),
}
WITH_REFERENCE = ["DPO", "GRPO", "RLOO"]
Make = Callable[..., Trainer]


@pytest.fixture
def base_path(tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> str:
    """A saved base model: TRL reads the reference of full fine-tuning from the folder that the model came from."""
    tiny_llama(vocab_size=100, eos_token_id=None).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def make(base_path: str, character_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Make:
    """`make("DPO", model=base_path, peft_config=None, **settings of its config)`: a trainer of four-row batches."""

    def build(
        kind: str, model: str | PeftModel = base_path, peft_config: PeftConfig | None = None, **settings: Any
    ) -> Trainer:
        trainer_cls, config_cls, rows, arguments, defaults = TRAINERS[kind]
        args = config_cls(
            output_dir=str(tmp_path / kind),
            **{
                "max_steps": 3,
                "per_device_train_batch_size": 4,
                "per_device_eval_batch_size": 4,
                "learning_rate": 0.05,
                "max_grad_norm": 0.0,
                "logging_steps": 1,
                "save_strategy": "no",
                "use_cpu": True,
                "bf16": False,
                "seed": 0,
                "disable_tqdm": True,
                "report_to": "none",
                **defaults,
                **settings,
            },
        )
        return trainer_cls(
            model,
            args=args,
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows),
            processing_class=character_tokenizer,
            peft_config=peft_config,
            **arguments,
        )

    return build


@pytest.fixture
def trained_adapter(base_path: str, tmp_path: Path) -> Callable[[PeftConfig], PeftModel]:
    """Loads a model with an adapter that is far from a fresh one, to be trained on: `load(config)`."""

    def load(config: PeftConfig) -> PeftModel:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_path), config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(tmp_path / "start")
        base = AutoModelForCausalLM.from_pretrained(base_path)
        return PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)

    return load


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(ids).logits


def logits_under(model: PeftModel, adapter: str) -> torch.Tensor:
    active = model.active_adapter
    model.set_adapter(adapter)
    result = logits(model)
    model.set_adapter(active)
    return result


def parameters_of(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if f".{adapter}." in name or name.endswith(f".{adapter}")
    }


def logged(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("kind", TRAINERS)
def test_one_step_is_the_step_of_full_training_seen_in_the_singular_basis(
    make: Make, base_path: str, kind: str
) -> None:
    """W(offset) = Σᵢ σᵢ (1 + offsetᵢ) uᵢ vᵢᵀ, so ∂loss/∂offsetᵢ = σᵢ uᵢᵀ (∂loss/∂W) vᵢ at offset 0. After one step of
    plain gradient descent the same holds for the changes; the right side comes from training every weight."""
    settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"}
    base = dict(AutoModelForCausalLM.from_pretrained(base_path).named_parameters())
    full = make(kind, **settings)
    full.train()
    svf = make(kind, peft_config=SVFConfig(task_type="CAUSAL_LM"), **settings)
    svf.train()
    assert logged(svf, "loss") == pytest.approx(logged(full, "loss"), abs=1e-6)

    after, offsets = dict(full.model.named_parameters()), parameters_of(svf.model, "default")
    assert len(offsets) == 14
    for name, offset in offsets.items():
        name = name.removeprefix("base_model.model.").replace("svf_offset.default.", "")
        u, s, vh = torch.linalg.svd(base[name].detach().double(), full_matrices=False)
        expected = s * torch.einsum("oi,on,in->i", u, (after[name] - base[name]).detach().double(), vh)
        assert expected.norm() > 1e-4
        torch.testing.assert_close(offset.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", TRAINERS)
def test_training_changes_the_offsets_alone_and_saves_them(
    make: Make, base_path: str, tmp_path: Path, kind: str
) -> None:
    trainer = make(kind, peft_config=SVFConfig(task_type="CAUSAL_LM"))
    trainer.train()
    offsets = parameters_of(trainer.model, "default")
    assert len(offsets) == 14 and all(offset.abs().max() > 0 for offset in offsets.values())
    assert list(trainer.model.peft_config) == ["default"]  # the reference is the base model, no second adapter
    trainer.save_model(str(tmp_path / "expert"))

    base = AutoModelForCausalLM.from_pretrained(base_path)
    untouched = logits(base)
    loaded = PeftModel.from_pretrained(base, tmp_path / "expert")
    assert torch.equal(logits(loaded), logits(trainer.model))
    assert not torch.allclose(logits(loaded), untouched, atol=1e-3)
    assert torch.equal(logits(trainer.model.unload()), untouched)


@pytest.mark.parametrize("kind", TRAINERS)
def test_offsets_stay_float32_on_a_bfloat16_base(make: Make, kind: str) -> None:
    settings = {"max_steps": 1, "bf16": True, "model_init_kwargs": {"dtype": torch.bfloat16}}
    trainer = make(kind, peft_config=SVFConfig(task_type="CAUSAL_LM"), **settings)
    trainer.train()
    offsets = parameters_of(trainer.model, "default")
    assert trainer.model.dtype == torch.bfloat16
    assert {offset.dtype for offset in offsets.values()} == {torch.float32}
    assert all(offset.abs().max() > 0 for offset in offsets.values())


@pytest.mark.parametrize("kind", WITH_REFERENCE)
def test_reference_adapter_is_the_starting_adapter_and_stays_so(
    make: Make, trained_adapter: Callable[[PeftConfig], PeftModel], kind: str
) -> None:
    model = trained_adapter(SVFConfig(task_type="CAUSAL_LM"))
    start, start_logits = parameters_of(model, "default"), logits(model)
    with model.disable_adapter():
        assert (logits(model) - start_logits).abs().max() > 0.1  # a fresh adapter would be seen
    trainer = make(kind, model=model)
    assert torch.equal(logits_under(trainer.model, "ref"), start_logits)

    trainer.train()
    reference = parameters_of(trainer.model, "ref")
    assert {name.replace(".ref.", ".default."): value for name, value in reference.items()}.keys() == start.keys()
    assert all(torch.equal(reference[name.replace(".default.", ".ref.")], value) for name, value in start.items())
    assert torch.equal(logits_under(trainer.model, "ref"), start_logits)
    trained = parameters_of(trainer.model, "default")
    assert all(not torch.equal(trained[name], value) for name, value in start.items())
    if kind == "DPO":  # policy and reference agree before the first step: the loss is −log σ(0)
        assert logged(trainer, "loss")[0] == pytest.approx(0.6931, abs=1e-4)
        assert logged(trainer, "loss")[-1] < 0.69
    else:
        divergence = logged(trainer, "kl")
        assert divergence[0] == pytest.approx(0, abs=1e-6) and divergence[-1] > 1e-5


@pytest.mark.parametrize("kind", WITH_REFERENCE)
def test_a_tuner_with_a_parameter_dict_gets_a_fresh_adapter_as_reference(
    make: Make, trained_adapter: Callable[[PeftConfig], PeftModel], kind: str
) -> None:
    """Why SVF keeps its offsets in modules. TRL copies the parameters with ".default." in their names; those of a
    ParameterDict end in ".default". Should this fail, TRL has mended it, and the test can go."""
    model = trained_adapter(IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]))
    layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    assert isinstance(layer.ia3_l, nn.ParameterDict)
    start_logits = logits(model)
    trainer = make(kind, model=model)
    assert (logits_under(trainer.model, "ref") - start_logits).abs().max() > 1e-2


@pytest.mark.parametrize("start", ["base model", "trained adapter"])
def test_dpo_loss_after_training_is_the_formula_over_policy_and_reference(
    make: Make,
    base_path: str,
    character_tokenizer: PreTrainedTokenizerFast,
    trained_adapter: Callable[[PeftConfig], PeftModel],
    start: str,
) -> None:
    """With `peft_config` the reference is the base model, with an adapter it is the adapter as it was."""
    config = SVFConfig(task_type="CAUSAL_LM")
    if start == "base model":
        reference = AutoModelForCausalLM.from_pretrained(base_path)
        trainer = make("DPO", peft_config=config)
    else:
        model = trained_adapter(config)
        reference = trained_adapter(config).merge_and_unload()
        trainer = make("DPO", model=model)
    trainer.train()
    measured = trainer.evaluate()["eval_loss"]

    def log_probability(model: nn.Module, prompt: str, answer: str) -> torch.Tensor:
        prompt_ids, ids = (character_tokenizer(text).input_ids for text in (prompt, prompt + answer))
        ids = torch.tensor([[*ids, character_tokenizer.eos_token_id]])
        scores = logits(model, ids)[0, :-1].double().log_softmax(-1)
        return scores.gather(1, ids[0, 1:, None])[len(prompt_ids) - 1 :].sum()

    def margin(model: nn.Module) -> torch.Tensor:
        return torch.stack(
            [log_probability(model, prompt, good) - log_probability(model, prompt, bad) for prompt, good, bad in TEXTS]
        )

    expected = -logsigmoid(0.1 * (margin(trainer.model) - margin(reference))).mean()
    assert abs(float(expected) - 0.6931) > 0.01
    assert measured == pytest.approx(float(expected), abs=1e-4)


@pytest.fixture
def playground_trainer(tmp_path: Path) -> SFTTrainer:
    problems = generate_problems("math", "train", 128)
    answers = [
        {
            "prompt": [{"role": "user", "content": problem.prompt}],
            "completion": [{"role": "assistant", "content": problem.careful}],
        }
        for problem in problems
    ]
    args = SFTConfig(
        str(tmp_path),
        max_steps=10,
        per_device_train_batch_size=24,
        learning_rate=2e-2,
        gradient_checkpointing=False,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        seed=0,
        disable_tqdm=True,
        report_to="none",
    )
    return SFTTrainer(
        str(BANK_FOLDER / "base"),
        args=args,
        train_dataset=Dataset.from_list(answers),
        peft_config=SVFConfig(task_type="CAUSAL_LM"),
    )


def test_next_token_training_lowers_the_loss_and_saves_an_adapter(
    playground_trainer: SFTTrainer, tmp_path: Path
) -> None:
    playground_trainer.train()
    losses = logged(playground_trainer, "loss")
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    playground_trainer.save_model(str(tmp_path / "expert"))
    base = AutoModelForCausalLM.from_pretrained(BANK_FOLDER / "base")
    model = PeftModel.from_pretrained(base, str(tmp_path / "expert"))
    offsets = [p for name, p in model.named_parameters() if "svf_offset" in name]
    assert sum(offset.numel() for offset in offsets) == 3072
    assert all(offset.abs().max() > 0 for offset in offsets)
