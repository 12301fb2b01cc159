"""Offsets are float32 before, during and after training, whatever the base model is in; what would cast is refused."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TrainerCallback

from peft_svf import SVFConfig
from peft_svf.trainers import SVFPolicyGradientTrainer
from peft_svf.trainers.distributed import refuse_half_precision_engine


MakeTrainer = Callable[..., SVFPolicyGradientTrainer]
KINDS = {"4 bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "8 bit": {"load_in_8bit": True}}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture
def quantized(tmp_path: Path, tiny: SimpleNamespace) -> Callable[[str], Any]:
    """Loads a random Llama in one of KINDS, as users do."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    tokens = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    config = LlamaConfig(vocab_size=28, num_key_value_heads=2, max_position_embeddings=64, **sizes, **tokens)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")

    def load(kind: str) -> Any:
        options = BitsAndBytesConfig(**KINDS[kind])
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=options, device_map="cpu", dtype=torch.float32
        )

    return load


def trainable(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def copies(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainable(model).items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and expected
    assert all(found[name].dtype == torch.float32 and torch.equal(found[name], expected[name]) for name in expected)


class Recorder(TrainerCallback):
    """Types of offsets and of the optimizer's state at every step."""

    def __init__(self) -> None:
        self.dtypes: set[torch.dtype] = set()

    def on_step_end(self, *args: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        self.dtypes |= {p.dtype for p in trainable(model).values()}
        states = [value for state in optimizer.state.values() for value in state.values()]
        self.dtypes |= {value.dtype for value in states if value.is_floating_point()}
        self.dtypes |= {p.dtype for group in optimizer.param_groups for p in group["params"]}


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_small_updates_are_not_lost(quantized: Any, make_trainer: MakeTrainer, kind: str) -> None:
    """AdamW at 1e-4 from offsets near 0.3: in bfloat16, whose step there is 2e-3, none of them would move."""
    model = get_peft_model(quantized(kind), SVFConfig())
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.fill_(0.3)
    given, recorder = copies(model), Recorder()
    trainer = make_trainer(
        {"model": model, "peft_config": None, "callbacks": [recorder], "reward_funcs": by_row},
        max_steps=1,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
    )
    assert_equal(copies(trainer.model), given)  # exactly those that were given: TRL has rounded them to bfloat16
    generates = []
    original = trainer.model.generate
    trainer.model.generate = lambda *a, **k: generates.append(is_merged(trainer)) or original(*a, **k)
    trainer.train()
    assert recorder.dtypes == {torch.float32}
    assert generates and not any(generates)  # merging would quantize the merged weights again
    for name, parameter in trainable(trainer.model).items():
        moved = (parameter - given[name]).abs()
        assert parameter.dtype == torch.float32
        assert (moved > 5e-5).float().mean() > 0.8 and moved.max() < 3e-4


def by_row(completions: list[Any], index: list[int], **kwargs: Any) -> list[float]:
    return [1.0 if i % 2 else -1.0 for i in index]


def is_merged(trainer: SVFPolicyGradientTrainer) -> bool:
    return any(getattr(module, "merged", False) for module in trainer.model.modules())


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_offsets_survive_the_best_checkpoint_and_resuming(
    quantized: Any, make_trainer: MakeTrainer, tmp_path: Path, kind: str
) -> None:
    """With `peft_config`, where offsets start at 0; the optimizer is made after they are float32 again."""
    recorder = Recorder()
    options = {
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "per_device_train_batch_size": 8,
    }

    class Rising:
        """A reward that rises from one evaluation to the next, so that the last checkpoint is the best."""

        __name__ = "rising"
        trainer: SVFPolicyGradientTrainer

        def __call__(self, completions: list[Any], index: list[int], **kwargs: Any) -> list[float]:
            if self.trainer.model.training:
                return by_row(completions, index)
            return [0.1 * self.trainer.state.global_step] * len(completions)

    def build() -> SVFPolicyGradientTrainer:
        reward = Rising()
        trainer = make_trainer({"model": quantized(kind), "reward_funcs": reward, "callbacks": [recorder]}, **options)
        reward.trainer = trainer
        return trainer

    whole = build()
    assert all(p.dtype == torch.float32 and not p.any() for p in trainable(whole.model).values())
    whole.train()
    saved = load_file(tmp_path / "run" / "checkpoint-4" / "adapter_model.safetensors")
    saved = {name.replace(".weight", ".default.weight"): value for name, value in saved.items()}
    assert_equal(copies(whole.model), saved)
    rest = build()
    rest.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_equal(copies(rest.model), saved)
    assert recorder.dtypes == {torch.float32}


@needs_bitsandbytes
def test_a_saved_expert_on_a_quantized_base_is_trained_from_exactly_its_offsets(
    quantized: Any, make_trainer: MakeTrainer, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    model = get_peft_model(quantized("4 bit"), SVFConfig())
    tiny.randomize_offsets(model)
    given = copies(model)
    model.save_pretrained(tmp_path / "expert")
    again = PeftModel.from_pretrained(quantized("4 bit"), tmp_path / "expert", is_trainable=True)
    assert_equal(copies(make_trainer({"model": again, "peft_config": None}).model), given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_autocast_leaves_offsets_and_optimizer_in_float32(
    make_trainer: MakeTrainer, tiny: SimpleNamespace, dtype: torch.dtype
) -> None:
    recorder = Recorder()
    arguments = {"model": tiny.model(dtype), "callbacks": [recorder], "reward_funcs": by_row}
    trainer = make_trainer(arguments, max_steps=2, bf16=True, learning_rate=1e-4, kl_coef=0.1)
    trainer.train()
    assert recorder.dtypes == {torch.float32}
    assert all(0 < p.abs().max() < 3e-4 for p in trainable(trainer.model).values())


class CastAt(TrainerCallback):
    def __init__(self, event: str) -> None:
        setattr(self, event, self.cast)

    def cast(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            next(p for name, p in model.named_parameters() if "up_proj.svf_offset" in name).data = torch.zeros(
                32, dtype=torch.bfloat16
            )


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step"])
def test_a_callback_that_casts_is_refused_before_the_step(make_trainer: MakeTrainer, event: str) -> None:
    trainer = make_trainer({"callbacks": [CastAt(event)]}, max_steps=3)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.svf_offset.* is trainable in bfloat16"):
        trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_a_model_that_was_cast_after_the_trainer_was_made_is_refused(make_trainer: MakeTrainer, cast: str) -> None:
    trainer = make_trainer(max_steps=1)
    getattr(trainer.model, cast)()
    with pytest.raises(ValueError, match=r"q_proj\.svf_offset\.default\.weight` is trainable in"):
        trainer.train()


@pytest.mark.parametrize("option", ["bf16_full_eval", "fp16_full_eval"])
def test_evaluation_that_casts_the_model_for_good_is_refused(make_config: Callable[..., Any], option: str) -> None:
    with pytest.raises(ValueError, match=f"`{option}` casts the offsets to half precision for good"):
        make_config(**{option: True})


def fake_deepspeed_trainer(config: dict[str, Any], **args: bool) -> SimpleNamespace:
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
    options = SimpleNamespace(**{"bf16": False, "fp16": False, **args})
    return SimpleNamespace(is_deepspeed_enabled=True, accelerator=SimpleNamespace(state=state), args=options)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_half_precision_of_deepspeed_is_refused(name: str) -> None:
    """Not through DeepSpeed, which few have installed; tests/trainers/distributed runs it without."""
    for trainer in (fake_deepspeed_trainer({name: {"enabled": True}}), fake_deepspeed_trainer({}, **{name: True})):
        with pytest.raises(ValueError, match=rf"DeepSpeed's `{name}` mode casts the offsets.*`{name}=False`"):
            refuse_half_precision_engine(trainer)
    refuse_half_precision_engine(fake_deepspeed_trainer({name: {"enabled": "auto"}}))


def test_under_deepspeed_bf16_is_off_by_default(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_svf.trainers import svf_policy_gradient_config as module

    class SettledError(Exception):
        pass

    def stop(self: Any) -> None:
        raise SettledError(self.bf16)

    monkeypatch.setattr(module, "is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr(module.GRPOConfig, "__post_init__", stop)
    for uses_deepspeed, expected in {"true": False, "false": True}.items():
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", uses_deepspeed)
        with pytest.raises(SettledError, match=str(expected)):
            make_config(use_cpu=False)
