"""Registration of SVF: the only file that touches the registries of PEFT and transformers."""

from __future__ import annotations

import functools
from enum import Enum
from pathlib import Path
from typing import Any

from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.pipelines import PIPELINE_REGISTRY

from peft_svf.experts.auto import Transformer2Config, Transformer2ForCausalLM, Transformer2ForImageTextToText
from peft_svf.pipelines.image_text_to_text import Transformer2ImageTextToTextPipeline
from peft_svf.pipelines.text_generation import Transformer2Pipeline
from peft_svf.tuner import SVFConfig, SVFModel


PLAYGROUND_BANK = Path(__file__).parent / "playground" / "bank"


def register_tuner() -> None:
    """Make SVF a PEFT method like the built-in ones: `PeftType.SVF`, its configuration and its model.

    Does nothing the second time.

    Raises:
        RuntimeError: PEFT or another package already registered a method of this name.
    """
    peft_type = _add_member(PeftType, "SVF")
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if registered is SVFConfig:
        return
    if registered is not None:
        raise RuntimeError(
            f"PEFT already has a method SVF ({registered.__module__}.{registered.__qualname__}): use that one, or "
            "import peft_svf before it is registered"
        )
    # transformers' delete_adapter assumes that the prefix is the method's name and an underscore.
    register_peft_method(name="svf", config_cls=SVFConfig, model_cls=SVFModel, prefix=SVFModel.prefix)


def register_auto_classes() -> None:
    """Let transformers' Auto classes load banks (model type "transformer2"). Safe to call twice."""
    AutoConfig.register(Transformer2Config.model_type, Transformer2Config, exist_ok=True)
    AutoModelForCausalLM.register(Transformer2Config, Transformer2ForCausalLM, exist_ok=True)
    AutoModelForImageTextToText.register(Transformer2Config, Transformer2ForImageTextToText, exist_ok=True)


def register_pipelines() -> None:
    """Make our tasks known to `transformers.pipeline`; text generation loads the playground bank by default.

    Does nothing the second time.
    """
    if "transformer2-generation" in PIPELINE_REGISTRY.get_supported_tasks():
        return
    PIPELINE_REGISTRY.register_pipeline(
        "transformer2-generation",
        pipeline_class=Transformer2Pipeline,
        pt_model=AutoModelForCausalLM,
        default=_PlaygroundDefault(model=(str(PLAYGROUND_BANK), None)),
        type="text",
    )
    PIPELINE_REGISTRY.register_pipeline(
        "transformer2-image-text-to-text",
        pipeline_class=Transformer2ImageTextToTextPipeline,
        pt_model=AutoModelForImageTextToText,
        default=_NoDefault(model=None),
        type="multimodal",
    )
    for pipeline_class in (Transformer2Pipeline, Transformer2ImageTextToTextPipeline):
        # It would make Pipeline.save_pretrained write `custom_pipelines` and copies of our code into users' folders
        delattr(pipeline_class, "_registered_impl")


def register_push() -> None:
    """
    Let `push_to_hub` of a `PeftModel` with SVF adapters make the repository that [`~peft_svf.hub.push_expert`] makes.

    The original would upload a stock card, folders of this machine and, of the card, only what PEFT knows. It still
    serves all other models. Does nothing the second time.
    """
    original: Any = PeftModel.push_to_hub
    if hasattr(original, "pushes_svf"):
        return

    @functools.wraps(original)
    def push_to_hub(self: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        if any(config.peft_type != PeftType.SVF for config in self.peft_config.values()):
            return original(self, repo_id, *args, **kwargs)
        from peft_svf.hub.peft_push import push_model

        return push_model(self, repo_id, *args, **kwargs)

    push_to_hub.pushes_svf = True  # type: ignore[attr-defined]
    PeftModel.push_to_hub = push_to_hub


class _NoDefault(dict):
    """Says that a model is needed; transformers would raise `KeyError: 'default'`."""

    def __getitem__(self, key: str) -> Any:
        raise ValueError("This task has no default model; pass model=<folder or Hub id of a bank>.")


class _PlaygroundDefault(dict):
    """The default model of the pipeline; says so where an installation lacks it (transformers would ask the Hub)."""

    def __getitem__(self, key: str) -> Any:
        if key == "model" and not PLAYGROUND_BANK.is_dir():
            raise FileNotFoundError(
                f"The playground bank is missing from this installation ({PLAYGROUND_BANK}); install peft-svf again "
                "or pass model=<folder or Hub id of a bank>."
            )
        return super().__getitem__(key)


def _add_member(enum_cls: type[Enum], name: str) -> Any:
    """Add the member `name` = `"name"` to a `str` enum, if it has none of that name yet, and return it.

    PEFT accepts only members of its enum and has no hook for methods from outside. The tables written here are
    private to CPython and the same in Python 3.10 to 3.13.
    """
    if name in enum_cls.__members__:
        return enum_cls[name]
    member: Any = str.__new__(enum_cls, name)  # type: ignore[type-var]
    member._name_ = name
    member._value_ = name
    member._sort_order_ = len(enum_cls._member_names_)
    member.__objclass__ = enum_cls
    type.__setattr__(enum_cls, name, member)  # EnumType's own __setattr__ guards members
    enum_cls._member_names_.append(name)
    enum_cls._member_map_[name] = member
    enum_cls._value2member_map_[name] = member
    if hasattr(enum_cls, "_hashable_values_"):  # Python 3.13
        enum_cls._hashable_values_.append(name)
    if not (enum_cls(name) is enum_cls[name] is member and member in list(enum_cls)):
        raise RuntimeError("peft_svf cannot add SVF to PEFT's methods on this version of Python; use 3.10 to 3.13")
    return member
