"""The SVF cases that PEFT's own tests are run with.

PEFT's tests are parametrized over lists of configurations. Shared lists (`TEST_CASES`, `ALL_CONFIGS`, …) are named
here by module and variable, lists that are written in a decorator by module, test and argument names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from peft_svf import SVFConfig


RANDOM: dict[str, Any] = {"init_weights": False}
POOLER = r"(.*\.)?pooler\..*"
LLAMA = "trl-internal-testing/tiny-random-LlamaForCausalLM"
LLAMA4, GPT_OSS = "trl-internal-testing/tiny-Llama4ForCausalLM", "trl-internal-testing/tiny-GptOssForCausalLM"


class SquareMLP(nn.Module):
    """PEFT's MLPs have no square weight; this one has, in `lin0`."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 10)
        self.lin1 = nn.Linear(10, 2)
        self.dtype = torch.float

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        return self.lin1(self.lin0(X.to(self.dtype)).relu()).log_softmax(dim=-1)


# (name, model, configuration): `lin0` of "MLP" is tall, `lin1` is wide, `conv1d` is stored transposed.
CUSTOM_MODELS: list[tuple[str, str, dict[str, Any]]] = [
    ("tall", "MLP", {"target_modules": "lin0"}),
    ("wide", "MLP", {"target_modules": ["lin1"]}),
    ("tall and wide", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("square", "SquareMLP", {"target_modules": ["lin0"]}),
    ("regular expression", "MLP", {"target_modules": r".*lin\d"}),
    ("all-linear", "MLP2", {}),
    ("exclude_modules", "MLP", {"target_modules": "all-linear", "exclude_modules": ["lin1"]}),
    ("modules_to_save", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("Conv1D", "EmbConv1D", {"target_modules": ["conv1d"]}),
    ("Conv1D and linear", "EmbConv1D", {"target_modules": ["conv1d", "lin0"]}),
    ("trainable tokens", "EmbConv1D", {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 10]}}),
    ("rank", "MLP", {"target_modules": ["lin0", "lin1"], "rank": 1}),
    ("rank_pattern", "MLP", {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin0": 4}}),
    ("parameter", "MlpUsingParameters", {"target_parameters": ["lin0.weight"]}),
]
TWO_PARAMETERS = ["feed_forward.experts.down_proj", "feed_forward.experts.gate_up_proj"]
TARGET_PARAMETERS: list[tuple[str, list[str], list[str]]] = [  # model, modules, parameters
    (LLAMA4, [], ["feed_forward.experts.down_proj"]),
    (LLAMA4, [], ["0.feed_forward.experts.gate_up_proj", "1.feed_forward.experts.down_proj"]),
    (LLAMA4, [], TWO_PARAMETERS),
    (LLAMA4, ["q_proj", "v_proj"], ["feed_forward.experts.down_proj"]),
    (GPT_OSS, [], ["mlp.experts.down_proj"]),
    (GPT_OSS, [], ["0.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"]),
    (GPT_OSS, [], ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]),
    (GPT_OSS, ["q_proj", "v_proj"], ["mlp.experts.down_proj"]),
]


def _two(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, SVFConfig, SVFConfig]]:
    return [("SVF", SVFConfig(**first, **RANDOM), SVFConfig(**second, **RANDOM))]


def _tokens(**kwargs: Any) -> SVFConfig:
    return SVFConfig(**{"trainable_token_indices": {"embed_tokens": [0, 1, 3]}, **kwargs})


LIN0, LIN1, BOTH = ({"target_modules": names} for names in (["lin0"], ["lin1"], ["lin0", "lin1"]))
CONV1D = {"target_modules": ["conv1d"]}

SHARED_LISTS: dict[str, dict[str, list[Any]]] = {
    "test_custom_models": {
        "TEST_CASES": [(f"SVF {name}", model, SVFConfig, kwargs) for name, model, kwargs in CUSTOM_MODELS],
        "ALL_PEFT_CONFIG_CLASSES": [SVFConfig],
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": [
            ("SVF same", "svf", SVFConfig, {**LIN0, **RANDOM}, {**LIN0, **RANDOM}),
            ("SVF different", "svf", SVFConfig, {**LIN0, **RANDOM}, {**LIN1, **RANDOM}),
            ("SVF overlapping", "svf", SVFConfig, {**BOTH, **RANDOM}, {**LIN1, **RANDOM}),
            (
                "SVF and trainable tokens",
                "lora+trainable_tokens",
                SVFConfig,
                {**LIN0, **RANDOM, "trainable_token_indices": {"emb": [0, 1, 2]}},
                {**CONV1D, **RANDOM, "trainable_token_indices": {"emb": [3, 4, 5, 6]}},
            ),
        ],
        "MIXED_ADAPTER_TEST_CASES": _two(LIN0, {**LIN0, "rank": 5}) + _two(BOTH, BOTH),
    },
    "test_decoder_models": {
        "ALL_CONFIGS": [
            (SVFConfig, {"task_type": "CAUSAL_LM", "target_modules": None}),
            (SVFConfig, {"task_type": "CAUSAL_LM", "target_modules": None, "trainable_token_indices": [0, 1, 3]}),
        ],
    },
    "test_encoder_decoder_models": {
        "ALL_CONFIGS": [(SVFConfig, {"task_type": "SEQ_2_SEQ_LM", "target_modules": None})],
    },
    "test_feature_extraction_models": {
        # These tests take the output before the pooler, which therefore gets no gradient.
        "ALL_CONFIGS": [
            (SVFConfig, {"task_type": "FEATURE_EXTRACTION", "target_modules": None, "exclude_modules": POOLER})
        ],
    },
    "test_seq_classifier": {
        "ALL_CONFIGS": [(SVFConfig, {"task_type": "SEQ_CLS", "target_modules": None})],
    },
    "test_token_classification_qa": {
        "TOKEN_CLS_CONFIGS": [(SVFConfig, {"task_type": "TOKEN_CLS", "target_modules": None})],
        "QA_CONFIGS": [(SVFConfig, {"task_type": "QUESTION_ANS", "target_modules": None})],
    },
    "test_config": {
        "ALL_CONFIG_CLASSES": [(SVFConfig, {})],
        "LAYER_INDEXING_CONFIG_CLASSES": [(SVFConfig, {})],
    },
    "test_quantization": {
        "TEST_CASES": [(SVFConfig, {"target_modules": ["q_proj", "v_proj"]})],
    },
    "test_target_parameters": {
        "ALL_CONFIGS": [
            (
                model,
                SVFConfig,
                {"task_type": "CAUSAL_LM", "target_modules": modules, "target_parameters": parameters},
            )
            for model, modules, parameters in TARGET_PARAMETERS
        ],
    },
}

# Test, names of its arguments, cases.
INLINE_LISTS: dict[str, list[tuple[str, str, list[Any]]]] = {
    "test_custom_models": [
        (
            "test_mixed_adapter_batches_different_target_layers",
            "test_name, config0, config1",
            _two(LIN0, LIN1),
        ),
        (
            "test_mixed_adapter_batches_multiple_modules_to_save",
            "test_name, config0, config1",
            _two({**LIN0, "modules_to_save": ["lin1"]}, {**LIN0, "modules_to_save": ["lin1"]}),
        ),
        (
            "test_mixed_adapter_batches_unsupported_layer_raises",
            "test_name, config0, config1",
            _two({**LIN0, "modules_to_save": ["gru"]}, {**LIN0, "modules_to_save": ["gru"]}),
        ),
        (
            "test_mixed_adapter_batches_partly_overlapping_target_layers",
            "test_name, config0, config1",
            _two(LIN0, BOTH),
        ),
        ("test_mixed_adapter_batches_lora_conv1d_emb", "test_name, config0, config1", _two(CONV1D, CONV1D)),
        (
            "test_mixed_adapter_batches_lora_conv1d_emb_multiple_modules_to_save",
            "test_name, config0, config1",
            _two({**CONV1D, "modules_to_save": ["lin0"]}, {**CONV1D, "modules_to_save": ["lin0"]}),
        ),
        (
            "test_mixed_adapter_batches_lora_wrong_adapter_name_raises",
            "test_name, config",
            [("SVF", SVFConfig(**LIN0, **RANDOM))],
        ),
    ],
    "test_config": [("test_save_pretrained_with_target_modules", "config_class", [SVFConfig])],
    "test_low_level_api": [
        ("test_inject_from_state_dict_and_from_config_target_same_layers", "config", [SVFConfig()]),
    ],
    "test_other": [
        (
            "test_self_targeting_is_ignored",
            "config_cls, config_kwargs",
            [(SVFConfig, {"target_modules": "l1.*"}), (SVFConfig, {"target_modules": "(l1|svf_offset).*"})],
        ),
    ],
    "test_torch_compile": [
        (test, "settings", [(SVFConfig(task_type="CAUSAL_LM"), {})])
        for test in ("test_causal_lm_training_trainer_compile", "test_causal_lm_training_pytorch_compile")
    ],
    "test_trainable_tokens": [
        ("test_combined_with_peft_method_usage", "peft_config", [_tokens()]),
        ("test_disable_adapters_with_merging", "peft_config", [_tokens()]),
        ("test_safe_merge_with_adapter", "peft_config", [_tokens()]),
        ("test_load_multiple_adapters", "peft_config", [_tokens()]),
        *(
            (
                test,
                "peft_config_factory",
                [lambda indices: _tokens(trainable_token_indices={"embed_tokens": indices})],
            )
            for test in (
                "test_multiple_adapters_different_token_indices",
                "test_multiple_adapters_overlapping_token_indices_merging",
                "test_multiple_adapters_overlapping_token_indices_merging_sequentially",
                "test_multiple_adapters_disjunct_token_indices_merging_sequentially",
            )
        ),
        (
            "test_multiple_adapters_mixed_forward",
            "peft_config_factory",
            [
                lambda targets, indices: _tokens(
                    target_modules=targets, trainable_token_indices={"embed_tokens": indices}
                )
            ],
        ),
        (
            "test_combined_with_peft_raises_target_layer_not_found",
            "peft_config, target_layer_name",
            [(_tokens(trainable_token_indices={"does-not-exist": [0, 1, 2]}), "does-not-exist")],
        ),
        ("test_no_embeddings_in_save_with_combined_usage", "peft_config", [_tokens()]),
        ("test_weight_tying_noop_when_model_is_untied", "peft_config", [_tokens()]),
        (
            "test_weight_tying_applied_when_model_is_tied",
            "peft_config, model_weight_tied",
            [(_tokens(), "list"), (_tokens(), "mapping")],
        ),
        (
            "test_weight_tying_applied_when_model_is_tied_encoder_decoder",
            "peft_config",
            [_tokens(trainable_token_indices={"shared": [0, 1, 3]})],
        ),
        (
            "test_modules_to_save_excludes_trainable_tokens",
            "peft_config",
            [_tokens(modules_to_save=["embed_tokens"])],
        ),
        ("test_save_pretrained_auto", "peft_config", [_tokens(trainable_token_indices=[1, 2, 3])]),
    ],
}

# The part that continuous integration runs, by module: which parameters of a test belong to it.
FAST: dict[str, Callable[[dict[str, Any]], bool]] = {
    "test_config": lambda parameters: True,
    "test_custom_models": lambda parameters: parameters.get("test_name", "SVF") in FAST_CUSTOM_MODELS,
    "test_decoder_models": lambda parameters: (
        parameters.get("model_id") == LLAMA and "trainable_token_indices" not in parameters["config_kwargs"]
    ),
    "test_target_parameters": lambda parameters: (
        parameters["config_kwargs"]["target_parameters"] == TWO_PARAMETERS and parameters["model_id"] == LLAMA4
    ),
    "test_trainable_tokens": lambda parameters: True,
}
FAST_CUSTOM_MODELS = {
    "SVF",  # cases of mixed batches, and tests that are not named
    "SVF same",
    "SVF different",
    "SVF tall and wide",
    "SVF modules_to_save",
    "SVF Conv1D",
    "SVF rank",
}
