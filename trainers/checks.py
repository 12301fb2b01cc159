"""What can be found wrong with a training run before anything is loaded, generated or written."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
import transformers
from datasets import Dataset, DatasetDict, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoConfig

from peft_svf.trainers.distributed import whole


# What TRL passes to every reward function besides the columns of the dataset.
TRL_REWARD_KEYWORDS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
# Columns that TRL keeps to itself.
TRL_OWN_COLUMNS = ("prompt", "completion")

AnyDataset: TypeAlias = Dataset | IterableDataset
EvalDataset: TypeAlias = AnyDataset | DatasetDict | dict[str, AnyDataset] | None


def check_model(model: Any, peft_config: PeftConfig | None, trust_remote_code: bool) -> None:
    """Raise unless `model` is a causal language model with exactly one source of something to train."""
    if isinstance(model, str):
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        architecture = getattr(transformers, next(iter(config.architectures or []), ""), None)
        if architecture is not None:  # one of transformers' own
            _check_causal(architecture, architecture.__name__, config)
    else:
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        if not isinstance(base, nn.Module) or not hasattr(base, "can_generate"):
            raise TypeError(
                "`model` must be a causal language model of transformers, its path or a PeftModel, not "
                f"{type(model).__name__}."
            )
        _check_causal(base, type(base).__name__, base.config)
    if isinstance(model, PeftModel):
        check_trainable(model)
    elif peft_config is None:
        raise ValueError(
            "SVFPolicyGradientTrainer trains an adapter and leaves the base weights alone, but `model` has none: pass "
            "`peft_config=SVFConfig()`."
        )


def _check_causal(model: Any, name: str, config: Any) -> None:
    if not model.can_generate() or config.is_encoder_decoder:
        raise ValueError(
            f"{name} is not a causal language model, so it cannot generate answers to learn from: load the checkpoint "
            "with `AutoModelForCausalLM.from_pretrained`, or choose a decoder model."
        )


def check_trainable(model: nn.Module) -> None:
    """Raise unless something is trainable and all of it is float32: bfloat16 freezes small updates."""
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError(
            "Nothing in `model` is trainable: load the expert with `PeftModel.from_pretrained(..., "
            "is_trainable=True)`, or pass the base model and `peft_config=SVFConfig()`."
        )
    for name, parameter in trainable:
        if parameter.dtype != torch.float32:
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise ValueError(
                f"`{name}` is trainable in {dtype}, where updates smaller than its rounding are lost: convert what is "
                "trained to float32, or freeze it with `requires_grad_(False)`."
            )


def check_datasets(
    train_dataset: AnyDataset | None, eval_dataset: EvalDataset, reward_funcs: Any, prompt_required: bool = True
) -> None:
    """Raise unless every dataset has a `prompt` and the columns that the reward functions ask for."""
    functions = (
        reward_funcs if isinstance(reward_funcs, Sequence) and not isinstance(reward_funcs, str) else [reward_funcs]
    )
    for which, dataset in _named(train_dataset, eval_dataset):
        if which != "train" and isinstance(dataset, Dataset) and len(dataset) == 0:
            raise ValueError(f"The {which} dataset is empty: pass rows to evaluate on, or no `eval_dataset`.")
        columns = dataset.column_names
        if columns is None:  # a stream does not know its columns
            continue
        if prompt_required and "prompt" not in columns:
            raise ValueError(
                f"The {which} dataset has no column `prompt` (its columns: {', '.join(columns)}): rename the column "
                'that holds the text or the chat messages, e.g. `dataset.rename_column("question", "prompt")`.'
            )
        for function in functions:
            if callable(function) and not isinstance(function, nn.Module):
                _check_reward_columns(function, which, columns)


def check_images(is_vlm: bool, train_dataset: AnyDataset | None, eval_dataset: EvalDataset) -> None:
    """Raise if there are images but no processor for them: the chat template would leave them out or fail."""
    for which, dataset in _named(train_dataset, eval_dataset):
        columns = [name for name in ("image", "images") if name in (dataset.column_names or ())]
        if columns and not is_vlm:
            raise ValueError(
                f"The {which} dataset has images in its column `{columns[0]}`, but `processing_class` is a tokenizer: "
                "pass the processor of a vision-language model, `AutoProcessor.from_pretrained(...)`, or remove the "
                "column."
            )


def _named(train_dataset: AnyDataset | None, eval_dataset: EvalDataset) -> Iterator[tuple[str, AnyDataset]]:
    if train_dataset is not None:
        yield "train", train_dataset
    if isinstance(eval_dataset, dict):
        for name, dataset in eval_dataset.items():
            yield f"eval {name!r}", dataset
    elif eval_dataset is not None:
        yield "eval", eval_dataset


def _check_reward_columns(function: Callable[..., Any], which: str, columns: list[str]) -> None:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some callables written in C tell nothing
        return
    name = getattr(function, "__name__", type(function).__name__)
    given = {*TRL_REWARD_KEYWORDS, *columns} - set(TRL_OWN_COLUMNS)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for parameter in named:
        if parameter.default is parameter.empty and parameter.name not in given:
            raise ValueError(
                f"Reward function `{name}` needs a column `{parameter.name}`, which the {which} dataset does not have "
                f"(its columns: {', '.join(columns)}): add or rename the column, or give the parameter a default."
            )
    refused = sorted(given - {parameter.name for parameter in named})
    if refused and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(
            f"Reward function `{name}` does not take all it is given ({', '.join(refused)}): add `**kwargs` to its "
            "parameters."
        )


def check_enough_prompts(train_dataset: Any, args: Any) -> None:
    """Raise if the training set is smaller than one generation batch: TRL would drop it whole and train 0 steps."""
    needed = args.generation_batch_size // args.num_generations
    if isinstance(train_dataset, Dataset) and len(train_dataset) < needed:
        raise ValueError(
            f"The train dataset has {len(train_dataset)} prompts, but one generation batch takes {needed}: lower "
            f"`per_device_train_batch_size` ({args.per_device_train_batch_size}), `gradient_accumulation_steps` "
            f"({args.gradient_accumulation_steps}) or `steps_per_generation` ({args.steps_per_generation})."
        )


def check_best_metric(args: Any, eval_dataset: EvalDataset) -> None:
    """Raise if the best checkpoint is to be chosen by a metric that several named eval datasets will not produce."""
    if not args.load_best_model_at_end or not isinstance(eval_dataset, dict):
        return
    metric = args.metric_for_best_model
    if not any(f"eval_{metric.removeprefix('eval_')}".startswith(f"eval_{name}_") for name in eval_dataset):
        choices = ", ".join(f'"eval_{name}_reward"' for name in eval_dataset)
        raise ValueError(
            f"`metric_for_best_model={metric!r}` is not a metric of the eval datasets: set it to one of {choices}."
        )


def trainable_snapshot(model: Any) -> dict[str, Tensor]:
    """Copies of what is trainable in `model`, whole and on the CPU, by name; empty if `model` is not loaded yet.

    All processes must call this together.
    """
    if not isinstance(model, nn.Module):
        return {}
    return {
        name: whole(parameter).detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
