"""SVF in a trainer of TRL that knows nothing of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from peft_svf import SVFConfig
from peft_svf.playground import BANK_FOLDER, generate_problems


@pytest.fixture
def trainer(tmp_path: Path) -> SFTTrainer:
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
        max_steps=12,
        per_device_train_batch_size=32,
        learning_rate=2e-2,
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


def test_next_token_training_lowers_the_loss_and_saves_an_adapter(trainer: SFTTrainer, tmp_path: Path) -> None:
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    trainer.save_model(str(tmp_path / "expert"))
    base = AutoModelForCausalLM.from_pretrained(BANK_FOLDER / "base")
    model = PeftModel.from_pretrained(base, str(tmp_path / "expert"))
    offsets = [p for name, p in model.named_parameters() if "svf_offset" in name]
    assert sum(offset.numel() for offset in offsets) == 3072
    assert all(offset.abs().max() > 0 for offset in offsets)
