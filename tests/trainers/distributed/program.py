"""What the processes of test_distributed.py do: training runs that are the same whatever the number of processes.

Started by `accelerate launch program.py FOLDER SCENARIO...`; every process leaves <scenario>.<rank>.json (facts) and
<scenario>.<rank>.safetensors (offsets) in the folder. The tests call the same scenarios in their own, single process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


os.environ["OMP_NUM_THREADS"] = "1"
if sys.platform == "linux":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo would look up the name of the machine

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, TrainerCallback

from peft_svf import SVFConfig
from peft_svf.trainers import SVFPolicyGradientConfig, SVFPolicyGradientTrainer


def load_builders() -> Any:
    """The tiny model, its tokenizer and its prompts, from the fixtures of tests/trainers."""
    spec = importlib.util.spec_from_file_location("builders", Path(__file__).parents[1] / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


builders = load_builders()
GLOBAL_BATCH = 8  # answers per optimizer step, over all processes
STEPS = 5
END = 2
Facts = dict[str, Any]
Result = tuple[Facts, dict[str, Tensor]]


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def uses_deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


class Scripted(SVFPolicyGradientTrainer):
    """Answers depend on the prompt and the step alone, so that every number of processes sees the same ones."""

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        prompts = [tuple(map(int, ids)) for ids in prompt_ids]
        return [answer(p, self.state.global_step, prompts[:i].count(p)) for i, p in enumerate(prompts)], None


def answer(prompt: tuple[int, ...], step: int, repetition: int) -> list[int]:
    """One to six words; one in four is cut off, that is, has no end."""
    source = random.Random(f"{prompt} {step} {repetition}")
    words = [source.randrange(5, 28) for _ in range(source.randrange(1, 6))]
    return words if source.random() < 0.25 else [*words, END]


def settings(folder: Path, accumulation: int = 1, **options: Any) -> SVFPolicyGradientConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": GLOBAL_BATCH // world() // accumulation,
        "gradient_accumulation_steps": accumulation,
        "per_device_eval_batch_size": 8 // world(),
        "max_completion_length": 6,
        "max_steps": STEPS,
        "use_cpu": not uses_deepspeed(),  # which accelerate switches off with `use_cpu`
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": [],
        "save_strategy": "no",
        "learning_rate": 0.05,
        "max_grad_norm": 0.5,  # clips some steps and not others
        "kl_coef": 0.3,
    }
    return SVFPolicyGradientConfig(**{**defaults, **options})


def make(
    folder: Path,
    trainer_class: type[SVFPolicyGradientTrainer] = Scripted,
    arguments: dict[str, Any] | None = None,
    **options: Any,
) -> SVFPolicyGradientTrainer:
    defaults = {
        "model": builders.build_model(),
        "reward_funcs": builders.even_digits,
        "train_dataset": builders.prompts(64),
        "eval_dataset": builders.prompts(21, shift=3),
        "processing_class": builders.build_tokenizer(),
        "peft_config": SVFConfig(),
    }
    trainer = trainer_class(**{**defaults, **(arguments or {})}, args=settings(folder, **options))
    trainer.remove_callback(PrinterCallback)
    return trainer


def whole(parameter: Tensor) -> Tensor:
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone().contiguous()


def parameters(trainer: SVFPolicyGradientTrainer, trainable: bool) -> dict[str, Tensor]:
    return {name: whole(p) for name, p in trainer.model.named_parameters() if p.requires_grad == trainable}


def offsets(trainer: SVFPolicyGradientTrainer) -> dict[str, Tensor]:
    return parameters(trainer, trainable=True)


def from_path(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Result:
    """The model loaded by the trainer, which ZeRO-3 partitions while it is read, and saved at the end."""
    options = {"model_init_kwargs": {"dtype": str(dtype).removeprefix("torch.")}, **options}
    trainer = make(folder, arguments={"model": str(folder.parent / f"base_{dtype}")}, **options)
    trainer.train()
    trainer.save_model(str(folder / "expert"))
    return facts_of(trainer), offsets(trainer)


def save_bases(folder: Path) -> None:
    """Write what `from_path` reads. Not in the program: under ZeRO-3 a model is saved without its weights."""
    for dtype in (torch.float32, torch.bfloat16):
        builders.build_model(dtype).save_pretrained(folder / f"base_{dtype}")


def facts_of(trainer: SVFPolicyGradientTrainer) -> Facts:
    return {
        "processes": trainer.accelerator.num_processes,
        "backend": distributed.get_backend() if distributed.is_initialized() else None,
        "wrapped": type(trainer.model_wrapped).__name__,
        "history": trainer.state.log_history,
        "dtypes": sorted({str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}),
        "sharded": all(isinstance(p, DTensor) for p in trainer.model.parameters() if p.requires_grad),
    }


def curve(folder: Path, **options: Any) -> Result:
    """A whole run: cosine schedule, clipping, KL, answers of different lengths."""
    trainer = make(folder, **options)
    trainer.train()
    return facts_of(trainer), offsets(trainer)


def by_row(completions: list[Any], index: list[int], **kwargs: Any) -> list[float | None]:
    """Every third row cannot be judged."""
    return [None if i % 3 == 0 else (1.0 if i % 2 else -1.0) for i in index]


def evaluation(folder: Path) -> Result:
    """21 and 6 rows, which no batch size divides; decoded greedily, before and after two steps."""
    datasets = {"valid": builders.prompts(21, shift=3), "other": builders.prompts(6, shift=1)}
    arguments = {"eval_dataset": datasets, "reward_funcs": [builders.even_digits, by_row]}
    trainer = make(folder, GreedyInEvaluation, arguments, max_steps=2)
    builders.randomize_offsets(trainer.model)
    refused = ""
    try:
        trainer.evaluate()
    except RuntimeError as error:
        refused = str(error)
    trainer.train()
    return {**facts_of(trainer), "metrics": trainer.evaluate(), "refused": refused}, offsets(trainer)


class GreedyInEvaluation(Scripted):
    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        skipped = Scripted if not self.model.training else SVFPolicyGradientTrainer
        method = (
            super(skipped, self)._generate_single_turn if not self.model.training else super()._generate_single_turn
        )
        return method(*args, **kwargs)


class ScriptedScores(TrainerCallback):
    """A reward that is `scores[k]` in the k-th evaluation of this process, and ±1 by row in training."""

    def __init__(self, scores: list[float]) -> None:
        self.scores = scores
        self.evaluations = 0
        self.trainer: SVFPolicyGradientTrainer

    def reward(self, completions: list[Any], index: list[int], **kwargs: Any) -> list[float]:
        if self.trainer.model.training:
            return [1.0 if i % 2 else -1.0 for i in index]
        return [self.scores[self.evaluations]] * len(completions)

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.evaluations += 1


def best(folder: Path, scores: list[float], **options: Any) -> Result:
    """Six steps from an expert that is not the base model, with an evaluation at 0, 2, 4 and 6."""
    script = ScriptedScores(scores)
    trainer = make(
        folder,
        Scripted,
        {"reward_funcs": script.reward, "callbacks": [script]},
        **{"max_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, **options},
    )
    script.trainer = trainer
    before = offsets(trainer)
    trainer.train()
    trainer.save_model(str(folder / "expert"))
    facts = {
        **facts_of(trainer),
        "best_step": trainer.state.best_global_step,
        "best_metric": trainer.state.best_metric,
        "is_start": all(torch.equal(before[name], value) for name, value in offsets(trainer).items()),
    }
    return facts, offsets(trainer)


def resumed(folder: Path) -> Result:
    """Four steps at once, and two, from the checkpoint of the second."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make(folder, **options)
    whole.train()
    rest = make(folder, **options)
    rest.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    same = all(torch.equal(value, offsets(whole)[name]) for name, value in offsets(rest).items())
    return {**facts_of(rest), "same": same, "whole": whole.state.log_history}, offsets(rest)


class Spy:
    """even_digits, remembering the answers of this process."""

    __name__ = "even_digits"

    def __init__(self) -> None:
        self.answers: list[list[str]] = []

    def __call__(self, completions: list[Any], **kwargs: Any) -> list[float]:
        self.answers.append([completion[0]["content"] for completion in completions])
        return builders.even_digits(completions, **kwargs)


def sampled(folder: Path) -> Result:
    """Real answers, from merged weights: it learns, and processes do not sample the same answers to one prompt."""
    spy = Spy()
    same = Dataset.from_list([dict(row) for row in builders.prompts(1)] * 512)
    trainer = make(
        folder,
        SVFPolicyGradientTrainer,
        {"reward_funcs": spy, "train_dataset": same},
        per_device_train_batch_size=64 // world(),
        max_steps=15,
        learning_rate=0.1,
        max_grad_norm=1.0,
        kl_coef=0.01,
    )
    base = parameters(trainer, trainable=False)
    trainer.train()
    unchanged = all(torch.equal(p, base[n]) for n, p in parameters(trainer, trainable=False).items())
    return {**facts_of(trainer), "answers": spy.answers[0], "base_unchanged": unchanged}, offsets(trainer)


SCENARIOS: dict[str, Callable[[Path], Result]] = {
    "curve": curve,
    "no KL": lambda folder: curve(folder, kl_coef=0.0, baseline="none"),
    "group": lambda folder: curve(folder, baseline="group", num_generations=2),
    "k1 reward": lambda folder: curve(folder, kl_estimator="k1_reward"),
    "masked": lambda folder: curve(folder, mask_truncated_completions=True),
    "unjudged": lambda folder: curve(folder, arguments={"reward_funcs": by_row}),
    "accumulated": lambda folder: curve(folder, accumulation=4 // world()),
    "from path": from_path,
    "from path in bfloat16": lambda folder: from_path(folder, torch.bfloat16),
    "bf16": lambda folder: curve(folder, bf16=True),
    "evaluation": evaluation,
    "best": lambda folder: best(folder, [0.5, 0.2, 0.9, 0.4]),
    "start is best": lambda folder: best(folder, [0.5, 0.2, 0.3, 0.4]),
    "resumed": resumed,
    "sampled": sampled,
}


def switch_fsdp_on() -> None:
    """accelerate turns FSDP on only where there are GPUs; everything behind this switch runs on the CPU too."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def with_fsdp(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if "fsdp_plugin" not in AcceleratorState._shared_state:
            for state in (PartialState, AcceleratorState):
                state._shared_state["distributed_type"] = DistributedType.FSDP
            plugin = FullyShardedDataParallelPlugin()  # from the environment of `accelerate launch`
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            AcceleratorState._shared_state["fsdp_plugin"] = plugin
            self.__dict__ = AcceleratorState._shared_state

    AcceleratorState.__init__ = with_fsdp  # type: ignore[method-assign]


def let_deepspeed_run_on_cpu() -> None:
    import deepspeed
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    # DeepSpeed would compile a faster collective first, which takes minutes.
    deepspeed.ops.__compatible_ops__.update(deepspeed_shm_comm=False, shm_comm=False)
    # accelerate looks for a backend of a GPU, finds none and goes on as one process.
    PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_CPU)  # type: ignore[method-assign]


def leave(folder: Path, scenario: str, rank: int, result: Result) -> None:
    facts, tensors = result
    save_file(tensors, folder / f"{scenario}.{rank}.safetensors")
    (folder / f"{scenario}.{rank}.json").write_text(json.dumps(facts))


def main() -> None:
    folder, *scenarios = sys.argv[1:]
    rank = int(os.environ["RANK"])
    if uses_deepspeed() and not torch.cuda.is_available():
        let_deepspeed_run_on_cpu()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not torch.cuda.is_available():
        switch_fsdp_on()
    for scenario in scenarios:
        leave(Path(folder), scenario, rank, SCENARIOS[scenario](Path(folder) / scenario))
    distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # without the clean-up of libraries, which takes seconds


if __name__ == "__main__":
    main()
