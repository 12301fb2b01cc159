"""Arguments of `peft-svf train`: a few of our own, and every field of `SVFPolicyGradientConfig`, as flags or YAML."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trl import TrlParser

from peft_svf.trainers import SVFPolicyGradientConfig


MIN_TEST_PROMPTS = 2  # a paired difference has no interval below
DTYPES = ("auto", "float32", "bfloat16", "float16")

# Options of the trainer that `--help` shows besides ours, with what this command's defaults make of them.
IMPORTANT = {
    "learning_rate": "",
    "max_steps": "Optimizer steps; by default as many as `num_train_epochs` takes.",
    "num_train_epochs": "",
    "per_device_train_batch_size": "Answers in one forward and backward pass.",
    "gradient_accumulation_steps": "",
    "num_generations": "",
    "baseline": "",
    "kl_coef": "",
    "temperature": "Of the answers that are learned from.",
    "max_completion_length": "Tokens of an answer, at most. By default what the task needs.",
    "eval_steps": "Steps between validations; below 1, a share of all steps. By default a tenth.",
    "early_stopping_patience": "",
    "per_device_eval_batch_size": "Answers generated at once in evaluations. By default 32.",
    "use_cpu": "Do not use an accelerator.",
    "use_vllm": "Generate answers with vLLM.",
    "log_completions": "Print and save sampled answers with their rewards.",
    "report_to": "Where to log: tensorboard, wandb, trackio, ..., all or none.",
    "seed": "",
}


@dataclass
class TrainArguments:
    """
    What `peft-svf train` asks besides the trainer's own configuration.

    Args:
        model (`str`): Base model: a folder or an id on the Hub.
        task (`str`): Name of a task, or a file with prompts and answers.
        output (`str`): Folder for the expert, its card, `results.json` and the checkpoints.
        data_files (`list[str]`, *optional*):
            Files to read instead of the Hub: a folder, or `train=FILE test=FILE` (for the task routing,
            `SOURCE=FOLDER`).
        train_prompts (`int`, *optional*): Prompts to train on, drawn with `seed`; all if None.
        validation_prompts (`int`, *optional*, defaults to 256): Prompts to choose the best checkpoint by, at most.
        test_prompts (`int`, *optional*):
            Held-out prompts on which base and expert are compared in the end; all if None, 0 for no comparison.
        paper (`bool`, *optional*, defaults to `False`): The paper's recipe: `SVFConfig.paper()` and
            `SVFPolicyGradientConfig.paper()`; other flags still change it.
        kl_sweep (`list[float]`, *optional*):
            Train once with each of these values of `kl_coef` and keep the best by validation.
        rank (`int`, *optional*): Leading singular values of each weight to train; all if None.
        target_modules (`list[str]`, *optional*): Modules to adapt; all linear layers if None.
        layers (`list[int]`, *optional*): Indices of the layers to adapt; all if None.
        adapter (`str`, *optional*): An SVF expert of the same base model to go on from.
        dtype (`str`, *optional*, defaults to `"auto"`): Of the base model; `"auto"` is that of its checkpoint.
        load_in_4bit, load_in_8bit (`bool`, *optional*, defaults to `False`): Quantize the base model on loading.
        revision (`str`, *optional*): Revision of the base model on the Hub.
        resume (`bool`, *optional*, defaults to `False`): Go on from the last checkpoint in `output`, if there is one.
    """

    _argument_group_name = "expert and data"

    model: str = field(metadata={"help": "Base model: a folder or an id on the Hub."})
    task: str = field(metadata={"help": "Name of a task (an unknown one lists all), or a table with its prompts."})
    output: str = field(metadata={"help": "Folder for the expert, its card, results.json and the checkpoints."})
    data_files: list[str] | None = field(
        default=None,
        metadata={"help": "Files instead of the Hub's: a folder, or train=FILE test=FILE (routing: SOURCE=FOLDER)."},
    )
    train_prompts: int | None = field(default=None, metadata={"help": "Prompts to train on; all if not given."})
    validation_prompts: int = field(
        default=256, metadata={"help": "Prompts by which the best checkpoint is chosen, at most."}
    )
    test_prompts: int | None = field(
        default=None,
        metadata={"help": "Held-out prompts to compare base and expert on; all if not given, 0 for no comparison."},
    )
    paper: bool = field(
        default=False, metadata={"help": "The paper's recipe (parametrization and training); flags still change it."}
    )
    kl_sweep: list[float] | None = field(
        default=None, metadata={"help": "Train with each of these `kl_coef`, e.g. 0 0.1 0.2 0.3; keep the best."}
    )
    rank: int | None = field(default=None, metadata={"help": "Leading singular values to train; all if not given."})
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules to adapt; all linear layers if not given."}
    )
    layers: list[int] | None = field(default=None, metadata={"help": "Layers to adapt, e.g. 0 2 4; all if not given."})
    adapter: str | None = field(default=None, metadata={"help": "SVF expert of this base model to go on from."})
    dtype: str = field(default="auto", metadata={"help": f"Of the base model: {', '.join(DTYPES)}."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize the base model to 4 bits (bitsandbytes)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantize the base model to 8 bits (bitsandbytes)."})
    revision: str | None = field(default=None, metadata={"help": "Revision of the base model on the Hub."})
    resume: bool = field(
        default=False, metadata={"help": "Go on from the last checkpoint in the output folder, if there is one."}
    )

    def __post_init__(self) -> None:
        for name in ("data_files", "target_modules", "layers", "kl_sweep"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, list):  # one value in a YAML file
                setattr(self, name, _as_list(value))
        self._check_numbers()
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype is one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("--load_in_4bit and --load_in_8bit exclude each other: choose one")
        chosen = [name for name in ("rank", "target_modules", "layers") if getattr(self, name) is not None]
        if self.adapter is not None and chosen:
            raise ValueError(
                f"--{chosen[0]} is settled by the expert that --adapter goes on from: remove one of the two"
            )
        if self.kl_sweep is not None and (len(set(self.kl_sweep)) < len(self.kl_sweep) or min(self.kl_sweep) < 0):
            raise ValueError("--kl_sweep takes different values of at least 0, for example: 0 0.1 0.2 0.3")

    def _check_numbers(self) -> None:
        least = {"train_prompts": 1, "validation_prompts": 1, "rank": 1}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"--{name} must be at least {minimum}, but it is {value}")
        if self.test_prompts not in (None, 0) and self.test_prompts < MIN_TEST_PROMPTS:
            raise ValueError(
                f"--test_prompts must be 0 or at least {MIN_TEST_PROMPTS}, for a paired comparison; it is "
                f"{self.test_prompts}"
            )


class TrainParser(TrlParser):
    """
    TRL's parser of flags and YAML for [`TrainArguments`] and the trainer's configuration.

    The latter is not built here: `parse` gives only what the user set, so that defaults can depend on the task.
    """

    def __init__(self) -> None:
        super().__init__(
            [TrainArguments, SVFPolicyGradientConfig],
            prog="peft-svf train",
            usage="peft-svf train --model MODEL --task TASK --output FOLDER [options]",
            description="Train an expert with policy gradients and compare it with the base model.",
            epilog="Options can also stand in a YAML file: --config FILE. Flags win over the file.",
            add_help=False,
            allow_abbrev=False,
        )
        self.own = {f.name for f in dataclasses.fields(TrainArguments)}
        for action in self._actions:
            if action.dest not in self.own:
                action.default = argparse.SUPPRESS
            if getattr(action.type, "__name__", "") == "string_to_bool" and action.nargs is None:
                action.nargs, action.const = "?", True  # `--disable_tqdm` without a value, like any other switch
        self.add_argument("-h", "--help", action=_ShortHelp, help="Show the options that matter most, and exit.")
        self.add_argument("--help_all", "--help-all", action="help", help="Show all options, and exit.")

    def parse(self, words: Sequence[str]) -> tuple[TrainArguments, dict[str, Any]]:
        """
        Our arguments, and the fields of the configuration that the user set, in flags or in the YAML file.

        Exits with status 2 after an unknown or malformed option, which it names.
        """
        separate = [part for word in words for part in (word.split("=", 1) if word[:9] == "--config=" else [word])]
        if separate[-1:] == ["--config"]:
            self.error("argument --config: expected one argument")
        arguments, values, unknown = self.parse_args_and_config(separate, return_remaining_strings=True)
        if unknown:
            self.error(self._about_unknown(unknown))
        if "output_dir" in values:
            self.error("argument --output_dir: the folder is given by --output")
        return arguments, values

    def parse_args_into_dataclasses(self, args: Iterable[str] | None = None, **kwargs: Any) -> tuple[Any, ...]:
        """Called by TRL's `parse_args_and_config`; the second dataclass stays a dict of what was set."""
        namespace, unknown = self.parse_known_args(None if args is None else list(args))
        values = vars(namespace)
        own = {name: values.pop(name) for name in self.own}
        return TrainArguments(**own), values, unknown

    def _about_unknown(self, unknown: Sequence[str]) -> str:
        known = [option for action in self._actions for option in action.option_strings]
        name = next((word for word in unknown if word.startswith("-")), unknown[0]).split("=")[0]
        close = difflib.get_close_matches(name, known, n=1)
        return f"unknown argument {name}" + (f"; did you mean {close[0]}?" if close else "; see --help-all")


class _ShortHelp(argparse.Action):
    """`--help` without the hundreds of options that few need."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        assert isinstance(parser, TrainParser)
        print(f"usage: {parser.usage}\n\n{parser.description}\n{parser.epilog}")
        for title, owner, names in (
            ("Expert and data", TrainArguments, [f.name for f in dataclasses.fields(TrainArguments)]),
            ("Training (the rest: --help-all)", SVFPolicyGradientConfig, IMPORTANT),
        ):
            print(f"\n{title}:")
            about = {f.name: f for f in dataclasses.fields(owner)}
            for name in names:
                print(_described(about[name]))
        parser.exit()


def _described(option: dataclasses.Field[Any]) -> str:
    """One option with its help and default, in two columns."""
    text = " ".join(str(IMPORTANT.get(option.name) or option.metadata["help"]).split())
    has_default = option.default not in (dataclasses.MISSING, None) and option.default is not False
    if has_default and "default" not in text:
        text += f" Default: {option.default}."
    flag = f"  --{option.name.replace('_', '-')}"
    first, *rest = textwrap.wrap(text, 79)
    return "\n".join([f"{flag:34}{first}", *(" " * 34 + line for line in rest)])


def _as_list(value: Any) -> list[Any]:
    return [f"{name}={path}" for name, path in value.items()] if isinstance(value, dict) else [value]
