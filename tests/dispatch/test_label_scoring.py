"""Label scores from one cached forward equal brute force: one plain forward for each prompt and label."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

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
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_svf.dispatch.label_scoring import LabelScorer
from peft_svf.dispatch.label_scoring.label_tree import split_into_trees
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


# -------------------------------------------------------------------- limits of memory
def tiny_scorer(tiny_llama, tokenizer, labels=LABELS, **limits) -> LabelScorer:
    model = tiny_llama(vocab_size=100, max_position_embeddings=256)
    return LabelScorer(model, RoutingTemplate(tokenizer, INSTRUCTION), labels, **limits)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("limits", [{"max_logits": 100 * 6}, {"max_logits": 100 * 40}, {"max_tokens": 350}])
def test_labels_and_rows_are_split_to_keep_to_the_limits(tiny_llama, character_tokenizer, limits, use_cache):
    labels = ("code", "math", "mathematics", "comedy", "others")
    scorer = tiny_scorer(tiny_llama, character_tokenizer, labels, use_cache=use_cache, **limits)
    logits, tokens = [], []
    head, embedding = scorer.model.lm_head, scorer.model.model.embed_tokens
    head.register_forward_hook(lambda module, args, output: logits.append(output.numel()))
    embedding.register_forward_hook(lambda module, args, output: tokens.append(output.shape[0] * output.shape[1]))
    scores = scorer(PROMPTS)
    forwards = len(logits)
    longest_label = 100 * len("mathematics.")  # with the end token; one label is never split
    assert max(logits) <= max(limits.get("max_logits", 10**6), longest_label)
    assert max(tokens) <= limits.get("max_tokens", 10**6)
    assert forwards > len(PROMPTS)
    assert scorer_is_cached(scorer) == use_cache
    torch.testing.assert_close(scores, brute_force(scorer, PROMPTS), atol=1e-4, rtol=0)


def test_a_tree_holds_every_common_beginning_once(character_tokenizer):
    ids = [character_tokenizer(f"expert {i}")["input_ids"] for i in range(300)]
    (tree,) = split_into_trees(ids, most=1000)
    assert len(tree) == len("expert ") + 9 + 20  # 1…9 begin others, 10…29 too; last tokens are not in the tree
    several = split_into_trees(ids, most=12)
    assert max(map(len, several)) <= 12
    assert sorted(member for part in several for member in part.members) == list(range(300))


def test_labels_that_the_tokenizer_does_not_tell_apart_are_refused(tiny_llama, character_tokenizer):
    with pytest.raises(ValueError, match="same tokens of the labels 'é' and 'ü'"):
        tiny_scorer(tiny_llama, character_tokenizer, ("math", "é", "ü"))
    with pytest.raises(ValueError, match="no labels"):
        tiny_scorer(tiny_llama, character_tokenizer, ())


def test_weights_that_give_no_numbers_are_an_error_and_not_a_choice(tiny_llama, character_tokenizer):
    scorer = tiny_scorer(tiny_llama, character_tokenizer)
    weight = scorer.model.model.layers[0].mlp.up_proj.weight
    kept = weight[0, 0].item()
    weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite .* hold NaN"):
        scorer(PROMPTS)
    weight.data[0, 0] = kept
    torch.testing.assert_close(scorer(PROMPTS, version=2), brute_force(scorer, PROMPTS), atol=1e-4, rtol=0)
    assert scorer._cache.get(2) is not None  # the failure was the weights', not the model's


# -------------------------------------------------------------------- attention without 4-D masks
def attention_of_2d_masks(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """flash-attention's contract: keys that a 2-D mask hides are cut out, the rest is causal, aligned at the end."""
    assert attention_mask is None or attention_mask.dim() == 2
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    output = torch.zeros_like(query)
    for row in range(len(query)):
        seen = torch.ones(key.shape[2]).bool() if attention_mask is None else attention_mask[row].bool()
        asks = seen[-query.shape[2] :]
        q, k, v = query[row][:, asks], key[row][:, seen], value[row][:, seen]
        causal = torch.ones(q.shape[1], k.shape[1]).tril(k.shape[1] - q.shape[1]).bool()
        scores = (q @ k.mT * (scaling or q.shape[-1] ** -0.5)).masked_fill(~causal, -torch.inf)
        output[row, :, asks] = scores.softmax(-1) @ v
    return output.transpose(1, 2), None


@pytest.mark.parametrize("labels", [LABELS, ("a", "b", "c")])
@pytest.mark.parametrize("name", ["flash_attention_2", "someone/kernel", "paged|sdpa"])
def test_attention_without_4d_masks_scores_long_labels_plainly(
    tiny_llama, character_tokenizer, monkeypatch, name, labels
):
    """A function of flash-attention's contract under its name, and names that transformers makes no masks for."""
    scorer = tiny_scorer(tiny_llama, character_tokenizer, labels)
    expected = brute_force(scorer, PROMPTS)
    masks = []

    def attention(*args, **kwargs):
        masks.append(args[4])
        return attention_of_2d_masks(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, name, attention)
    scorer.model.config._attn_implementation = name
    torch.testing.assert_close(scorer(PROMPTS), expected, atol=1e-4, rtol=0)
    assert scorer_is_cached(scorer) == (name == "flash_attention_2" and labels != LABELS)
    assert {mask.dim() for mask in masks if mask is not None} == ({2} if name == "flash_attention_2" else set())


def test_a_change_of_attention_is_noticed(tiny_llama, character_tokenizer):
    scorer = tiny_scorer(tiny_llama, character_tokenizer)
    scorer(PROMPTS)
    scorer.model.set_attn_implementation("eager")
    torch.testing.assert_close(scorer(PROMPTS), brute_force(scorer, PROMPTS), atol=1e-4, rtol=0)
    assert scorer._cache.fills == 2


# -------------------------------------------------------------------- threads
def in_threads(work, count: int) -> list:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


def test_threads_fill_the_cache_once_and_nobody_changes_it(tiny_llama, character_tokenizer):
    scorer = tiny_scorer(tiny_llama, character_tokenizer, max_logits=100 * 16)  # several trees: the cache is cropped
    expected = brute_force(scorer, PROMPTS)
    start = threading.Barrier(4)

    def score(thread: int) -> torch.Tensor:
        start.wait()
        prompts = PROMPTS if thread % 2 else PROMPTS[::-1]
        return torch.stack([scorer(prompts) for _ in range(3)])

    results = in_threads(score, 4)
    filled = [layer.keys.clone() for layer in scorer._cache.get().layers]
    for thread, scores in enumerate(results):
        wanted = expected if thread % 2 else expected.flip(0)
        torch.testing.assert_close(scores, wanted.expand(3, -1, -1), atol=1e-4, rtol=0)
    assert scorer._cache.fills == 1
    scorer(PROMPTS)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(scorer._cache.get().layers, filled, strict=True))
    assert {keys.shape[2] for keys in filled} == {len(scorer.prefix)}


def test_a_thread_that_truncates_with_the_same_tokenizer_does_not_shorten_what_is_scored(character_tokenizer):
    template = RoutingTemplate(character_tokenizer, INSTRUCTION)
    stop = threading.Event()

    def truncate(_: int) -> None:
        while not stop.is_set():
            character_tokenizer(["x" * 50, "y"], truncation=True, max_length=5, padding=True)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(truncate, 0)
        lengths = {len(template.encode("x" * 50)) for _ in range(500)}
        stop.set()
    assert lengths == {len(template.render("x" * 50))}


def test_a_scorer_can_be_copied_for_another_process(tiny_llama, character_tokenizer):
    scorer = tiny_scorer(tiny_llama, character_tokenizer)
    scores = scorer(PROMPTS)
    assert torch.equal(pickle.loads(pickle.dumps(scorer))(PROMPTS), scores)
