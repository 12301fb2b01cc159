"""Experts and banks on the Hugging Face Hub: pushed in one commit, pulled from one commit."""

from __future__ import annotations

from peft_svf.hub.collection import add_to_collection
from peft_svf.hub.destination import Pushed
from peft_svf.hub.pull import Pulled, pull
from peft_svf.hub.push import push_bank, push_expert


__all__ = ["Pulled", "Pushed", "add_to_collection", "pull", "push_bank", "push_expert"]
