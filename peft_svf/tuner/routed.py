"""RoutedModel: runs a model under a mixed batch, in one thread, through forward and through every way to generate."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from peft_svf.tuner.adapted import wrapping_modules
from peft_svf.tuner.batches import BatchesByThread
from peft_svf.tuner.layer import SVFLayer
from peft_svf.tuner.mixed_batch import BASE_MODEL, MixedBatch
from peft_svf.tuner.parameter import ParamWrapper, no_mixed_batches


Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]

_METHODS_LOCK = threading.Lock()  # for the methods of a model that are wrapped while any thread has a route


class RoutedModel:
    """The part of [`SVFModel`] that runs mixed batches.

    A mixed batch belongs to the thread that entered it. Other threads see neither it nor anything else changed, and a
    thread that is started inside does not inherit it. It holds for the adapters of this model only, so that an
    assistant model computes under its own, and it wins over `disable_adapter`, which is a matter of all threads.
    """

    model: nn.Module
    training: bool
    peft_config: dict[str, Any]
    svf_batches: BatchesByThread

    @contextmanager
    def routed(self, batch: MixedBatch) -> Iterator[None]:
        """Run what this thread computes under `batch`: other threads, and the active adapter, are not touched.

        Raises:
            ValueError: The model is in training mode, lacks an adapter, has adapted modules that see no rows, or a
                matrix belongs to no group.
        """
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode. Call `model.eval()`.")
        unknown = set(batch.adapters) - set(self.peft_config)
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}; loaded are "
                f"{', '.join(sorted(self.peft_config))} and {BASE_MODEL}"
            )
        modules = list(wrapping_modules(self.model))
        layers = [module for module in modules if isinstance(module, SVFLayer)]
        batch.check_groups(layers)
        if not batch.is_uniform:
            refuse_layers_without_rows(self.model, layers, batch)
        batches = self.svf_batches
        with ExitStack() as stack:
            stack.enter_context(_generation_follows(self.model, batches))
            for module in modules:
                if isinstance(module, AuxiliaryTrainingWrapper):
                    batch.check_one_hot(module._adapters)
                    stack.enter_context(_whole_module_follows(module, batch, batches))
            stack.enter_context(batches.entered(batch))
            yield

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Mixed batches: what a call of forward or generate says of its rows."""
        adapter_names = kwargs.pop("adapter_names", None)
        current = self.svf_batches.current()
        if adapter_names is not None:
            if not isinstance(adapter_names, (list, tuple)):
                raise TypeError(f"`adapter_names` must be a list with one name for each row, got {adapter_names!r}")
            with self.routed(MixedBatch.of_names(adapter_names)):
                yield
        else:
            if isinstance(current, MixedBatch):
                current.forget_offsets()
            yield


def share_batches(model: nn.Module) -> BatchesByThread:
    """Let all adapted layers of `model`, those just added too, see the same mixed batches; tell which see rows."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SVFLayer)}
    shared = (layer.svf_batches for layer in layers.values() if layer.svf_batches is not None)
    batches = next(shared, None) or BatchesByThread()
    text_modules = _text_modules(model)
    for name, layer in layers.items():
        layer.svf_batches = batches
        routed_tokens = isinstance(layer, ParamWrapper) or "experts" in name.split(".")
        layer.svf_sees_rows = not routed_tokens and (text_modules is None or layer in text_modules)
    return batches


def refuse_layers_without_rows(model: nn.Module, layers: list[SVFLayer], batch: MixedBatch) -> None:
    """Raise a `ValueError` that names a layer which the batch changes, but cannot tell the rows of the batch apart."""
    blind = {layer for layer in layers if not layer.svf_sees_rows and batch.changes(layer)}
    if not blind:
        return
    first = next(module for module in model.modules() if isinstance(module, SVFLayer) and module in blind)
    if isinstance(first, ParamWrapper):
        raise ValueError(no_mixed_batches(first.svf_name))
    what = "tokens routed to it" if "experts" in first.svf_name.split(".") else "images or sounds"
    raise ValueError(
        f"Cannot pass `adapter_names` when an adapter adapts '{first.svf_name}': it sees {what}, not rows; run one "
        "adapter at a time, or leave such modules out of the adapters"
    )


def _text_modules(model: nn.Module) -> set[nn.Module] | None:
    """The modules that see rows of text in a model that also sees images or sounds; `None` if it does not."""
    config = getattr(model, "config", None)
    if not any(getattr(config, kind, None) is not None for kind in ("vision_config", "audio_config")):
        return None
    pretrained: Any = model  # a transformers model, since it has such a configuration
    decoder = pretrained.get_decoder()
    if decoder is model:
        return None
    return {*decoder.modules(), *([] if (head := pretrained.get_output_embeddings()) is None else [head])}


class _FollowingMethod:
    """A method of a model that asks for the mixed batch of the calling thread. An object, so that models copy."""

    def __init__(self, model: nn.Module, name: str, batches: BatchesByThread) -> None:
        self.original: Callable[..., Any] = getattr(model, name)
        self.batches = batches
        self.name = name
        self.users = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = self.batches.current()
        if not isinstance(batch, MixedBatch):
            return self.original(*args, **kwargs)
        return _FOLLOWED[self.name](batch, self.original, *args, **kwargs)

    def __reduce__(self) -> Any:
        return _itself, (self.original,)  # a copy of the model has no routes


def _itself(method: Callable[..., Any]) -> Callable[..., Any]:
    return method


def _generate(batch: MixedBatch, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with batch.generating():
        return original(*args, **kwargs)


def _expand(
    batch: MixedBatch,
    original: Callable[..., Any],
    expand_size: int = 1,
    is_encoder_decoder: bool = False,
    input_ids: Any = None,
    **kwargs: Any,
) -> Any:
    # Called once by generate, with the rows of the prompts and with what beams and returned sequences come to.
    if input_ids is not None:
        batch.expand(len(input_ids), expand_size)
    return original(expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs)


def _refuse_other_threads(batch: MixedBatch, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    raise ValueError(
        "continuous batching runs in a thread of its own, which does not see the route of this one; use `generate`, "
        "or make one adapter active"
    )


_FOLLOWED: Mapping[str, Callable[..., Any]] = {
    "generate": _generate,
    "_expand_inputs_for_generation": _expand,
    "init_continuous_batching": _refuse_other_threads,
}


@contextmanager
def _generation_follows(model: nn.Module, batches: BatchesByThread) -> Iterator[None]:
    """Let the generation of `model` know the mixed batch of its thread, as long as any thread is in here."""
    followed = [name for name in _FOLLOWED if hasattr(model, name)]
    with _METHODS_LOCK:
        for name in followed:
            if not isinstance(vars(model).get(name), _FollowingMethod):
                setattr(model, name, _FollowingMethod(model, name, batches))
            vars(model)[name].users += 1
    try:
        yield
    finally:
        with _METHODS_LOCK:
            for name in followed:
                method = vars(model).get(name)
                if isinstance(method, _FollowingMethod):
                    method.users -= 1
                    if method.users == 0:
                        _put_back(model, name, method)


def _put_back(model: nn.Module, name: str, method: _FollowingMethod) -> None:
    delattr(model, name)
    if getattr(model, name) != method.original:  # the model had one of its own, not that of its class
        setattr(model, name, method.original)


@contextmanager
def _whole_module_follows(
    module: AuxiliaryTrainingWrapper, batch: MixedBatch, batches: BatchesByThread
) -> Iterator[None]:
    """Let a module that PEFT trains in full choose by row, in the thread that runs `batch`."""

    def pass_names(wrapper: AuxiliaryTrainingWrapper, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        if batches.current() is not batch:
            return args, kwargs
        inputs = args[0] if args else next(iter(kwargs.values()))
        # For PEFT a name without a copy of this module is an error; it means the module of the base model.
        names = batch.names(inputs, wrapper._adapters)
        if wrapper.disable_adapters and set(names) != {BASE_MODEL}:
            raise ValueError("adapters with whole modules cannot follow a route within `disable_adapter`; leave it")
        return args, {**kwargs, "adapter_names": names}

    handle = module.register_forward_pre_hook(pass_names, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
