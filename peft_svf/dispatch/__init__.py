"""Routes: what decides which experts answer which prompt."""

from peft_svf.dispatch.classifier import ClassifierDispatcher
from peft_svf.dispatch.prompt import PromptDispatcher
from peft_svf.dispatch.resolving import as_dispatcher
from peft_svf.dispatch.route import Dispatcher, Route
from peft_svf.dispatch.simple import CallableDispatcher, FixedDispatcher


__all__ = [
    "CallableDispatcher",
    "ClassifierDispatcher",
    "Dispatcher",
    "FixedDispatcher",
    "PromptDispatcher",
    "Route",
    "as_dispatcher",
]
