"""SVF is a PEFT method like any other, from the moment that peft_svf is imported."""

from __future__ import annotations

import copy
import enum
import json
import pickle
import subprocess
import sys

import pytest
from peft import PeftConfig, PeftType, mapping
from peft.utils import peft_types
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.pipelines import PIPELINE_REGISTRY

from peft_svf import (
    SVFConfig,
    SVFModel,
    Transformer2Config,
    Transformer2ImageTextToTextPipeline,
    Transformer2Pipeline,
)
from peft_svf.registration import _add_member, register_tuner


def test_svf_is_a_full_member_of_peft_type() -> None:
    member = PeftType.SVF
    assert PeftType("SVF") is PeftType["SVF"] is member and member in PeftType and list(PeftType)[-1] is member
    assert isinstance(member, PeftType) and member == "SVF" and hash(member) == hash("SVF")
    assert member.value == member.name == "SVF" and str(member) == str(PeftType.LORA).replace("LORA", "SVF")
    assert json.loads(json.dumps({"peft_type": member})) == {"peft_type": "SVF"}
    assert copy.deepcopy(member) is member and pickle.loads(pickle.dumps(member)) is member


def test_svf_is_in_the_mappings() -> None:
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SVF] is SVFConfig
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING["SVF"] is SVFModel
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.SVF] == SVFModel.prefix == "svf_"


def test_registering_again_changes_nothing() -> None:
    before = list(PeftType)
    register_tuner()
    assert list(PeftType) == before and mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SVF] is SVFConfig


def test_both_pipelines_are_tasks_of_transformers() -> None:
    for task, pipeline_class, auto_model in (
        ("transformer2-generation", Transformer2Pipeline, AutoModelForCausalLM),
        ("transformer2-image-text-to-text", Transformer2ImageTextToTextPipeline, AutoModelForImageTextToText),
    ):
        registered = PIPELINE_REGISTRY.check_task(task)[1]
        assert registered["impl"] is pipeline_class and registered["pt"] == (auto_model,)
        assert Transformer2Config in auto_model._model_mapping


def test_a_method_of_the_same_name_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mapping.PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.SVF, PeftConfig)
    with pytest.raises(RuntimeError, match=r"already has a method SVF \(peft\.config\.PeftConfig\)"):
        register_tuner()
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SVF] is PeftConfig


def test_an_existing_member_is_kept() -> None:
    class Kind(str, enum.Enum):
        LORA = "LORA"
        SVF = "SVF"

    assert _add_member(Kind, "SVF") is Kind.SVF and len(Kind) == 2
    added = _add_member(Kind, "NEW")
    assert added is Kind.NEW and Kind("NEW") is added and [k.value for k in Kind] == ["LORA", "SVF", "NEW"]


def test_other_members_are_untouched() -> None:
    assert peft_types.PeftType is PeftType
    assert PeftType("LORA") is PeftType.LORA and mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LORA] == "lora_"


def test_a_pickled_config_brings_the_registration_with_it(tmp_path: object) -> None:
    # Spawned workers unpickle before any code of the user runs.
    file = f"{tmp_path}/config"
    with open(file, "wb") as writer:
        pickle.dump(SVFConfig(target_modules=["q_proj"]), writer)
    code = f"import pickle; c = pickle.load(open({file!r}, 'rb')); print(c.peft_type, sorted(c.target_modules))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert process.stdout.strip() == "PeftType.SVF ['q_proj']"
