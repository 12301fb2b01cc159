"""A trained model, stories260K, adapted for real: by next-token loss on its own text, and by reward."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from peft_svf import SVFConfig
from peft_svf.trainers import SVFPolicyGradientConfig, SVFPolicyGradientTrainer


PROMPT = "Once upon a time, there was a"
FEMALE = re.compile(r"\b(she|her|girl|mom|Lily|Lucy|Mia|Sue)\b", re.IGNORECASE)


def load(path: str) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(path).eval()


def is_frozen_part(name: str) -> bool:
    return "svf_offset" not in name


@pytest.fixture(scope="module")
def texts(stories_path: str) -> torch.Tensor:
    """Texts that the model wrote at a low temperature, each from a random first token, shape (160, 34)."""
    torch.manual_seed(0)
    start = torch.cat([torch.ones(160, 1, dtype=torch.long), torch.randint(3, 512, (160, 1))], dim=1)
    settings = {"do_sample": True, "temperature": 0.3, "top_k": 0, "max_new_tokens": 32, "min_new_tokens": 32}
    return load(stories_path).generate(input_ids=start, attention_mask=torch.ones_like(start), **settings)


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids.masked_fill(torch.arange(ids.shape[1]) < 2, -100)).loss


@pytest.fixture(scope="module")
def trained(stories_path: str, texts: torch.Tensor) -> tuple[PeftModel, list[float]]:
    """The model after twelve steps on 128 of the texts, and its loss on the other 32 before and after."""
    model = get_peft_model(load(stories_path), SVFConfig(task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)
    held_out = []
    for step in range(12):
        if step == 0:
            held_out.append(float(loss_of(model, texts[128:]).detach()))
        loss = loss_of(model, texts[32 * (step % 4) :][:32])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held_out.append(float(loss_of(model, texts[128:]).detach()))
    return model.eval(), held_out


@torch.no_grad()
def test_next_token_training_lowers_the_loss_on_texts_it_did_not_see(
    trained: tuple[PeftModel, list[float]], stories_path: str, texts: torch.Tensor
) -> None:
    model, (before, after) = trained
    assert after < 0.9 * before
    base = load(stories_path)
    logits = base(texts[128:]).logits[:, 1:-1].double()  # the loss of the base model, from the definition
    chosen = logits.log_softmax(-1).gather(-1, texts[128:, 2:, None])
    assert before == pytest.approx(float(-chosen.mean()), abs=1e-5)
    frozen = dict(base.named_parameters())
    for name, parameter in model.named_parameters():
        if is_frozen_part(name):
            assert torch.equal(parameter, frozen[name.removeprefix("base_model.model.").replace(".base_layer", "")])
    offsets = [parameter for name, parameter in model.named_parameters() if not is_frozen_part(name)]
    assert sum(offset.numel() for offset in offsets) == 1920 and all(offset.abs().max() > 0 for offset in offsets)


FRESH_PROCESS = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
import peft_svf

base, expert, inputs, outputs = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), expert).eval()
ids = load_file(inputs)["ids"]
with torch.no_grad():
    save_file({"logits": model(ids).logits.contiguous()}, outputs)
"""


@torch.no_grad()
def test_the_trained_expert_gives_equal_logits_in_a_fresh_process(
    trained: tuple[PeftModel, list[float]], stories_path: str, texts: torch.Tensor, tmp_path: Path
) -> None:
    model = trained[0]
    model.save_pretrained(tmp_path / "expert")
    assert (tmp_path / "expert" / "adapter_model.safetensors").stat().st_size < 4 * 1920 + 16 * 1024
    save_file({"ids": texts[:8].contiguous()}, tmp_path / "inputs.safetensors")
    arguments = [stories_path, *(tmp_path / name for name in ("expert", "inputs.safetensors", "outputs.safetensors"))]
    command = [sys.executable, "-c", FRESH_PROCESS, *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    assert torch.equal(load_file(tmp_path / "outputs.safetensors")["logits"], model(texts[:8]).logits)


@torch.no_grad()
def test_merged_it_writes_the_same_text_and_unmerged_it_is_what_it_was(
    trained: tuple[PeftModel, list[float]], texts: torch.Tensor
) -> None:
    model, ids = trained[0], texts[:8]
    settings = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(ids[:, :4])}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    expected, answer = model(ids).logits, model.generate(input_ids=ids[:, :4], **settings)
    model.merge_adapter(safe_merge=True)
    merged = model(ids).logits
    assert 0 < (merged - expected).abs().max() < 1e-3
    assert torch.equal(model.generate(input_ids=ids[:, :4], **settings), answer)
    model.unmerge_adapter()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(ids).logits, expected)


def test_merge_and_unload_leaves_a_plain_model_with_close_logits(
    trained: tuple[PeftModel, list[float]], stories_path: str, texts: torch.Tensor, tmp_path: Path
) -> None:
    trained[0].save_pretrained(tmp_path / "expert")
    merged = PeftModel.from_pretrained(load(stories_path), tmp_path / "expert").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    plain = load(str(tmp_path / "merged"))
    assert type(plain) is LlamaForCausalLM and not [name for name in plain.state_dict() if "svf" in name]
    with torch.no_grad():
        torch.testing.assert_close(plain(texts[:8]).logits, trained[0](texts[:8]).logits, rtol=1e-3, atol=1e-3)


class WritesAboutWomen:
    """+1 for a text with a word for a woman or girl, else −1. Remembers the texts of every call."""

    __name__ = "writes_about_women"

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        self.calls.append(completions)
        return [1.0 if FEMALE.search(text) else -1.0 for text in completions]


def share_about_women(model: nn.Module, path: str) -> float:
    """Measured here, not by the trainer: 64 sampled continuations."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompt = tokenizer([PROMPT] * 64, return_tensors="pt")
    torch.manual_seed(1)
    ids = model.generate(**prompt, do_sample=True, top_k=0, max_new_tokens=24, pad_token_id=0)
    answers = tokenizer.batch_decode(ids[:, prompt.input_ids.shape[1] :], skip_special_tokens=True)
    return sum(FEMALE.search(answer) is not None for answer in answers) / 64


def test_policy_gradient_raises_the_reward(stories_path: str, tmp_path: Path) -> None:
    reward = WritesAboutWomen()
    trainer = SVFPolicyGradientTrainer(
        load(stories_path),
        reward,
        args=SVFPolicyGradientConfig(
            str(tmp_path / "run"),
            max_steps=6,
            per_device_train_batch_size=64,
            gradient_accumulation_steps=1,
            max_completion_length=24,
            learning_rate=2e-2,
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            seed=0,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=Dataset.from_list([{"prompt": PROMPT}] * 512),
        processing_class=AutoTokenizer.from_pretrained(stories_path),
        peft_config=SVFConfig(task_type="CAUSAL_LM"),
    )
    trainer.train()
    logged = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(logged) == 6 and len(set(reward.calls[0])) > 32  # many different texts
    for value, texts in zip(logged, reward.calls, strict=True):
        assert value == pytest.approx(sum(1 if FEMALE.search(text) else -1 for text in texts) / 64)

    trainer.save_model(str(tmp_path / "expert"))
    expert = PeftModel.from_pretrained(load(stories_path), tmp_path / "expert")
    offsets = [parameter for name, parameter in expert.named_parameters() if not is_frozen_part(name)]
    assert all(offset.abs().max() > 0 for offset in offsets)
    with expert.disable_adapter():
        before = share_about_women(expert, stories_path)
    assert share_about_women(expert, stories_path) > before + 0.2
