"""Routes: what decides which experts answer which prompt."""

from peft_svf.dispatch.prompt import PromptDispatcher
from peft_svf.dispatch.route import Dispatcher, Route


__all__ = ["Dispatcher", "PromptDispatcher", "Route"]
