"""How answers are decoded: at another temperature for a while, and what no one may set because it breaks scoring."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any


GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}

# Options in `generation_kwargs` that the trainer sets or that change what `generate` returns, with the remedy.
REFUSED_KWARGS = {
    "temperature": "log-probabilities belong to `temperature`: set that",
    "max_new_tokens": "set `max_completion_length`",
    "max_length": "set `max_completion_length`",
    "max_tokens": "set `max_completion_length`",
    "num_beams": "answers of a beam search are not samples of the policy: remove it",
    "num_return_sequences": "set `num_generations`",
    "n": "set `num_generations`",
    "logprobs": "the trainer needs those of the sampled tokens: remove it",
    "return_dict_in_generate": "the trainer needs token ids alone: remove it",
    "stop_strings": "TRL does not pass the tokenizer that it needs: cut answers in the reward function, or use vLLM "
    '(`use_vllm=True`) and `generation_kwargs={"stop": [...]}`',
}


@contextlib.contextmanager
def decoding_temperature(trainer: Any, temperature: float) -> Iterator[None]:
    """Let a [`~trl.GRPOTrainer`] generate at `temperature`, 0 being greedy; everything is as before afterwards.

    For evaluation: with vLLM no ratio to the sampled policy is computed, which would take another forward pass.
    """
    if trainer.use_vllm:
        saved = trainer.vllm_generation.temperature, trainer.vllm_importance_sampling_correction
        trainer.vllm_generation.temperature, trainer.vllm_importance_sampling_correction = temperature, False
        try:
            yield
        finally:
            trainer.vllm_generation.temperature, trainer.vllm_importance_sampling_correction = saved
        return
    change = GREEDY if temperature == 0.0 else {"temperature": temperature}
    config, kwargs = trainer.generation_config, trainer.generation_kwargs
    trainer.generation_config = copy.deepcopy(config)
    for name, value in change.items():
        setattr(trainer.generation_config, name, value)
    trainer.generation_kwargs = {**kwargs, **change}
    try:
        yield
    finally:
        trainer.generation_config, trainer.generation_kwargs = config, kwargs


def check_decoding(args: Any) -> None:
    """Raise for options under which answers are not scored as they were generated; warn where they are biased.

    Args:
        args (`SVFPolicyGradientConfig`): The configuration.

    Raises:
        ValueError: An option of `generation_kwargs` is the trainer's own, or makes all answers of a group the same.
    """
    kwargs = args.generation_kwargs or {}
    for name, remedy in REFUSED_KWARGS.items():
        if name in kwargs and kwargs[name] is not None:
            raise ValueError(f"`{name}` in `generation_kwargs` is not supported: {remedy}.")
    if kwargs.get("do_sample") is False and args.num_generations > 1:
        raise ValueError("Greedy answers to one prompt are all the same: remove `do_sample` from `generation_kwargs`.")
    filters = {"top_p": (1.0, None), "top_k": (0, None), "min_p": (0.0, None), "repetition_penalty": (1.0, None)}
    options = {**{name: getattr(args, name) for name in filters}, **kwargs}
    filtering = [name for name, neutral in filters.items() if options[name] not in neutral]
    filtering += ["do_sample"] if kwargs.get("do_sample") is False else []
    filtering += ["vllm_structured_outputs_regex"] if args.use_vllm and args.vllm_structured_outputs_regex else []
    if filtering:
        warnings.warn(
            f"Answers sampled with {', '.join(f'`{name}`' for name in filtering)} do not follow the policy whose "
            "log-probabilities are trained: the gradient is biased.",
            stacklevel=5,
        )
