"""Label scores from one cached forward equal brute force: one plain forward for each prompt and label."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from peft_svf.dispatch.label_scoring import LabelScorer
from peft_svf.dispatch.template import RoutingTemplate


INSTRUCTION = "Classify the request as code, math, reasoning or others."
PROMPTS = ["What is 2+2?", "Write a function that sorts a list of words.", "x", "Lily has a big red ball.\nAnd Tom?"]
LABELS = ("code", "math", "mathematics", "others")


@torch.no_grad()
def brute_force(scorer: LabelScorer, prompts: list[str]) -> torch.Tensor:
    scores = []
    for prompt in prompts:
        head = scorer.template.encode(prompt)
        row = []
        for label in scorer.label_ids:
            ids = torch.tensor([head + label])
            logp = scorer.model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            row.append(sum(float(logp[len(head) - 1 + j, token]) for j, token in enumerate(label)))
        scores.append(row)
    return torch.tensor(scores)


def scorer_is_cached(scorer: LabelScorer) -> bool:
    return scorer.use_cache and scorer._cache.get() is not None


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("template", ["chat", "plain"])
@pytest.mark.parametrize("labels", [LABELS, ("a", "b", "c")])
def test_scores_of_a_trained_model_equal_brute_force(stories_path, stories_tokenizer, labels, template, use_cache):
    if template == "plain":
        stories_tokenizer.chat_template = None
    model = AutoModelForCausalLM.from_pretrained(stories_path).eval()
    scorer = LabelScorer(model, RoutingTemplate(stories_tokenizer, INSTRUCTION), labels, use_cache=use_cache)
    assert len(scorer.prefix) > 20
    torch.testing.assert_close(scorer(PROMPTS), brute_force(scorer, PROMPTS), atol=1e-4, rtol=0)
    assert scorer_is_cached(scorer) == use_cache


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("labels", [LABELS, ("a", "b", "c")])
def test_a_second_batch_gives_the_same_scores(tiny_llama, character_tokenizer, labels, attention):
    model = tiny_llama(vocab_size=100, max_position_embeddings=256)
    model.set_attn_implementation(attention)
    scorer = LabelScorer(model, RoutingTemplate(character_tokenizer, INSTRUCTION), labels)
    expected = brute_force(scorer, PROMPTS)
    torch.testing.assert_close(scorer(PROMPTS), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(scorer(PROMPTS[::-1]), expected.flip(0), atol=1e-4, rtol=0)
    torch.testing.assert_close(scorer(PROMPTS[2:3]), expected[2:3], atol=1e-4, rtol=0)
    assert scorer_is_cached(scorer)


SMALL = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("model_class", "config", "cached"),
    [
        (GPT2LMHeadModel, GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2, n_positions=256), True),
        (
            MistralForCausalLM,
            MistralConfig(**SMALL, **HEADS, sliding_window=16),
            False,
        ),
        # the instruction takes 84 tokens, the prompts between 97 and 144
        (MistralForCausalLM, MistralConfig(**SMALL, **HEADS, sliding_window=400), True),
        (MistralForCausalLM, MistralConfig(**SMALL, **HEADS, sliding_window=130), True),
        (
            Qwen2ForCausalLM,
            Qwen2Config(**SMALL, **HEADS, use_sliding_window=True, sliding_window=24, max_window_layers=1),
            False,
        ),
        (Gemma3ForCausalLM, Gemma3TextConfig(**SMALL, **HEADS, head_dim=8, sliding_window=400), True),
        (BloomForCausalLM, BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=4), False),
        (MambaForCausalLM, MambaConfig(**SMALL, state_size=4), False),
    ],
    ids=[
        "learned-positions",
        "sliding-window",
        "window-beyond-prompts",
        "window-beyond-some-prompts",
        "some-layers-sliding",
        "sliding-and-full-layers",
        "alibi",
        "state-space",
    ],
)
def test_other_architectures_fall_back_where_the_cache_does_not_work(character_tokenizer, model_class, config, cached):
    torch.manual_seed(0)
    model = model_class(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(5)  # far from uniform
    scorer = LabelScorer(model, RoutingTemplate(character_tokenizer, INSTRUCTION), LABELS)
    torch.testing.assert_close(scorer(PROMPTS), brute_force(scorer, PROMPTS), atol=1e-4, rtol=1e-5)
    assert scorer_is_cached(scorer) == cached


def test_prompts_that_break_the_prefix_are_scored_plainly_beside_cached_ones(tiny_llama, character_tokenizer):
    scorer = LabelScorer(
        tiny_llama(vocab_size=100, max_position_embeddings=256),
        RoutingTemplate(character_tokenizer, INSTRUCTION),
        LABELS,
    )
    expected = brute_force(scorer, PROMPTS)
    longer = scorer.template.encode("What")[: len(scorer.prefix) + 3]  # only "Wha…" has it
    scorer.prefix = scorer._cache.tokens = longer
    scorer._cache._error = lambda cache: 0.0  # the probes of the trial do not have this prefix either
    torch.testing.assert_close(scorer(PROMPTS), expected, atol=1e-4, rtol=0)
    assert scorer_is_cached(scorer)


def test_labels_that_begin_one_another_are_closed_with_the_end_token(tiny_llama, character_tokenizer):
    template = RoutingTemplate(character_tokenizer, INSTRUCTION)
    end = character_tokenizer.eos_token_id
    model = tiny_llama(vocab_size=100)
    assert all(ids[-1] == end for ids in LabelScorer(model, template, ("math", "mathematics")).label_ids)
    assert all(ids[-1] != end for ids in LabelScorer(model, template, ("math", "code")).label_ids)


def test_a_prompt_that_does_not_fit_the_context_is_refused_with_the_numbers(tiny_llama, character_tokenizer):
    model = tiny_llama(vocab_size=100, max_position_embeddings=128)
    scorer = LabelScorer(model, RoutingTemplate(character_tokenizer, INSTRUCTION), LABELS)
    with pytest.raises(ValueError, match=r"takes \d+ tokens .* context of 128"):
        scorer(["x" * 100])
