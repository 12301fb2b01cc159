"""Evaluation of a model on a task: the same answers however they are batched, whatever the model was saved with."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from peft_svf import ExpertBank
from peft_svf.answering import plain_prompt
from peft_svf.dispatch import Route
from peft_svf.playground import BANK_FOLDER
from peft_svf.trainers.evaluation import Evaluation, evaluate, evaluate_success, greedy_answers
from peft_svf.trainers.rewards import Verdict, reward_function
from peft_svf.trainers.statistics import wilson_interval
from peft_svf.trainers.tasks import Task, get_task


BASE = BANK_FOLDER / "base"


@pytest.fixture(scope="module")
def bank() -> ExpertBank:
    return ExpertBank.from_pretrained(BANK_FOLDER)


@pytest.fixture
def math() -> Task:
    return get_task("playground-math")


@reward_function
def always_right(completions: list[str]) -> list[Verdict]:
    return [Verdict.right(completion) for completion in completions]


def task_of(reward: Any, max_new_tokens: int = 6) -> Task:
    def load(*args: Any, **kwargs: Any) -> Dataset:
        raise NotImplementedError

    return Task("own", "own", load, reward, max_new_tokens)


# -- the same answers however they are batched ------------------------------------------------------------------------
def test_batch_sizes_1_and_8_give_the_same_answers(bank: ExpertBank, math: Task) -> None:
    """Prompts of the three families, of very different lengths, in float32."""
    rows = [
        row for family in ("math", "code", "reasoning") for row in get_task(f"playground-{family}").load("test", 8)
    ]
    random.Random(0).shuffle(rows)
    dataset = Dataset.from_list([{"prompt": row["prompt"], "answer": row["answer"] or ""} for row in rows])
    bank.model.set_adapter("code")
    one, eight = (evaluate(bank.model, bank.tokenizer, math, dataset, size) for size in (1, 8))
    assert one == eight
    assert len(set(one.answers)) > 9  # and not the answer to one prompt for all
    assert {True, False} == set(one.successes)


def test_answers_are_those_of_generate_on_the_single_prompt(bank: ExpertBank, math: Task) -> None:
    rows = math.load("test", 6)
    with bank.base_only() as model:
        found = evaluate(model, bank.tokenizer, math, rows)
        for prompt, answer in zip(rows["prompt"], found.answers, strict=True):
            ids = bank.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")
            output = model.generate(**ids, max_new_tokens=math.max_new_tokens, do_sample=False)
            assert answer == bank.tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_batch_that_does_not_fit_is_halved(bank: ExpertBank, math: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = math.load("test", 12)
    with bank.base_only() as model:
        expected = evaluate(model, bank.tokenizer, math, rows)
        generate, sizes = model.generate, []

        def small_memory(input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            sizes.append(len(input_ids))
            if len(input_ids) > 3:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return generate(input_ids=input_ids, **kwargs)

        monkeypatch.setattr(model, "generate", small_memory)
        assert evaluate(model, bank.tokenizer, math, rows) == expected
        assert sizes == [12, 6, 3, 3, 6, 3, 3]
        monkeypatch.setattr(model, "generate", lambda **kwargs: (_ for _ in ()).throw(RuntimeError("a real mistake")))
        with pytest.raises(RuntimeError, match="a real mistake"):
            evaluate(model, bank.tokenizer, math, rows)


# -- whatever the model was saved with --------------------------------------------------------------------------------
def test_sampling_options_of_the_model_are_not_used_and_kept(bank: ExpertBank, math: Task) -> None:
    rows = math.load("test", 8)
    bank.model.set_adapter("math")
    expected = evaluate(bank.model, bank.tokenizer, math, rows)
    config = bank.base_model.generation_config
    before = config.to_dict()
    options = {"do_sample": True, "temperature": 5.0, "top_k": 3, "repetition_penalty": 9.0, "min_new_tokens": 22}
    try:
        for name, value in options.items():
            setattr(config, name, value)
        assert evaluate(bank.model, bank.tokenizer, math, rows) == expected
        assert {name: getattr(bank.base_model.generation_config, name) for name in options} == options
        assert bank.base_model.generation_config is config
    finally:
        for name in options:
            setattr(config, name, before.get(name))


def test_the_state_of_model_and_random_numbers_is_as_before(bank: ExpertBank, math: Task) -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE).train()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    evaluate(model, bank.tokenizer, math, math.load("test", 4), temperature=1.0)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_tokenizer_without_a_pad_token_that_pads_on_the_right(bank: ExpertBank, math: Task) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE, padding_side="right")
    tokenizer.pad_token = None
    rows = math.load("test", 8)
    bank.model.set_adapter("math")
    expected = evaluate(bank.model, bank.tokenizer, math, rows, 1)
    assert evaluate(bank.model, tokenizer, math, rows, 8).answers == expected.answers
    assert tokenizer.pad_token is None and tokenizer.padding_side == "right"


def test_every_end_token_of_the_model_ends_an_answer(
    tiny_llama: Callable[..., LlamaForCausalLM], character_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_llama(vocab_size=100)
    rows = Dataset.from_list([{"prompt": "abc"}, {"prompt": "a longer one"}])
    task = task_of(always_right, max_new_tokens=12)
    free = evaluate(model, character_tokenizer, task, rows).answers[0]
    end = character_tokenizer.convert_tokens_to_ids(free[3])
    model.generation_config.eos_token_id = [2, end]
    assert evaluate(model, character_tokenizer, task, rows).answers[0] == free[: free.index(free[3]) + 1]


# -- kinds of prompts -------------------------------------------------------------------------------------------------
def test_a_text_is_continued_and_a_chat_without_a_template_is_what_it_says(
    tiny_llama: Callable[..., LlamaForCausalLM], character_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_llama(vocab_size=100)
    chat = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 2 "}]
    assert plain_prompt(chat) == "Add.\n\n1 + 2\n"
    character_tokenizer.chat_template = None
    seen: list[Any] = []

    def reward(completions: list[Any], prompts: list[Any], **kwargs: Any) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [1.0] * len(completions)

    texts = evaluate(model, character_tokenizer, task_of(reward), Dataset.from_list([{"prompt": plain_prompt(chat)}]))
    chats = evaluate(model, character_tokenizer, task_of(reward), Dataset.from_list([{"prompt": chat}]))
    assert texts.answers == chats.answers
    ids = torch.tensor([character_tokenizer("Add.\n\n1 + 2\n")["input_ids"]])
    output = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    assert texts.answers[0] == character_tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    # as TRL calls rewards: messages for messages, text for text
    assert seen[0] == (plain_prompt(chat), texts.answers[0])
    assert seen[1] == (chat, [{"role": "assistant", "content": texts.answers[0]}])


def test_options_reach_the_chat_template(bank: ExpertBank) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if short %} so{% endif %}"
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "5-4=1, 6-4=2,"}]}])
    task = task_of(always_right)
    with bank.base_only() as model:
        answer = evaluate(model, tokenizer, task, rows, chat_template_kwargs={"short": True}).answers
        rendered = tokenizer("5-4=1, 6-4=2, so", add_special_tokens=False, return_tensors="pt")
        output = model.generate(**rendered, max_new_tokens=6, do_sample=False)
        expected = tokenizer.decode(output[0, rendered["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == [expected]


@pytest.fixture
def vision() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A random LLaVA that looks at four patches, with a character tokenizer and a chat template for images."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *(chr(code) for code in range(32, 127)), "\n"]
    inner = Tokenizer(models.WordLevel({character: i for i, character in enumerate(characters)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"<image>|[\s\S]"), behavior="isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": 16, "width": 16}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, crop_size=size),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(
            "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>"
            "{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
        ),
    )
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=32, **shape),
        text_config=LlamaConfig(vocab_size=len(characters), initializer_range=0.2, **shape),
        image_token_index=characters.index("<image>"),
    )
    return LlavaForConditionalGeneration(config).eval(), processor


def test_images_are_seen_and_answers_do_not_depend_on_the_batch(
    vision: tuple[LlavaForConditionalGeneration, LlavaProcessor],
) -> None:
    model, processor = vision
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.mul_(30)  # so that what is seen matters
    pixels = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    chats = [[{"role": "user", "content": text}] for text in ("What?", "What is in this picture?", "What?")]
    rows = Dataset.from_dict({"prompt": chats, "image": [Image.fromarray(picture) for picture in pixels]})
    task = task_of(always_right)
    batched = evaluate(model, processor, task, rows, 3)
    assert batched == evaluate(model, processor, task, rows, 1)
    assert batched.answers[0] != batched.answers[2]  # the same question about another image
    with pytest.raises(ValueError, match="pass the model's processor"):
        evaluate(model, processor.tokenizer, task, rows)
    without = rows.remove_columns("image")
    assert evaluate(model, processor, task, without).answers[0] == evaluate(model, processor, task, without).answers[2]


# -- samples ----------------------------------------------------------------------------------------------------------
def test_samples_follow_their_seed_and_belong_to_their_prompts(bank: ExpertBank) -> None:
    task = get_task("playground-code")
    rows = task.load("test", 6)
    with bank.base_only() as model:
        first, again, other = (
            evaluate(model, bank.tokenizer, task, rows, temperature=1.5, samples=4, seed=seed) for seed in (0, 0, 1)
        )
        greedy = evaluate(model, bank.tokenizer, task, rows)
        cold = evaluate(model, bank.tokenizer, task, rows, temperature=1e-4, samples=2)
    assert first == again and first.answers != other.answers
    assert len(first.answers) == 24 and first.prompts == 6
    assert any(len(set(first.answers[i : i + 4])) > 1 for i in range(0, 24, 4))
    assert cold.answers == [answer for answer in greedy.answers for _ in range(2)]


# -- under a dispatcher -----------------------------------------------------------------------------------------------
class ByLength:
    """Routes by the length of the prompt to one expert, to another or to a mixture, and counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def route(self, prompts: Sequence[Any]) -> Route:
        texts = [prompt[-1]["content"] for prompt in prompts]
        self.asked += texts
        weights = {0: [1.0, 0.0], 1: [0.0, 1.0], 2: [0.0, 0.0], 3: [0.5, 0.5]}
        scores = tuple({"length": float(len(text))} for text in texts)
        return Route(torch.tensor([weights[len(text) % 4] for text in texts]), ("math", "code"), scores)


def test_each_row_is_answered_under_the_route_of_its_prompt(bank: ExpertBank, math: Task) -> None:
    rows = math.load("test", 14)
    lengths = [len(prompt[-1]["content"]) for prompt in rows["prompt"]]
    found = evaluate(bank, bank.tokenizer, math, rows, 5, dispatcher=ByLength())
    names = ["math", "code", "others", "mixture"]
    assert found.experts == [names[length % 4] for length in lengths] and len(set(found.experts)) > 2
    assert [score["length"] for score in found.route.scores] == lengths
    for kind, route in enumerate(["math", "code", "others", {"math": 0.5, "code": 0.5}]):
        with bank.routed(route):
            alone = evaluate(bank.model, bank.tokenizer, math, rows)
        for row in (row for row, length in enumerate(lengths) if length % 4 == kind):
            assert (found.answers[row], found.rewards[row]) == (alone.answers[row], alone.rewards[row])
    with bank.base_only() as model:
        plain = evaluate(model, bank.tokenizer, math, rows)
    assert plain.route is None and plain.experts is None and plain.answers != found.answers


def test_a_dispatcher_is_asked_once_for_all_samples_of_a_prompt(bank: ExpertBank, math: Task) -> None:
    rows, dispatcher = math.load("test", 4), ByLength()
    found = evaluate(bank, bank.tokenizer, math, rows, dispatcher=dispatcher, temperature=1.0, samples=3)
    assert sorted(dispatcher.asked) == sorted(prompt[-1]["content"] for prompt in rows["prompt"])
    assert len(found.answers) == 12 and len(found.route) == 4


def test_bank_and_dispatcher_belong_together(bank: ExpertBank, math: Task) -> None:
    rows = math.load("test", 3)
    with pytest.raises(ValueError, match="pass the `ExpertBank` as the model"):
        evaluate(bank.model, bank.tokenizer, math, rows, dispatcher=ByLength())
    with pytest.raises(ValueError, match="A bank is evaluated under a `dispatcher`"):
        evaluate(bank, bank.tokenizer, math, rows)
    short = ByLength()
    short.route = lambda prompts: Route.mixture({"math": 1.0})  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="was given 3 prompts and routed 1"):
        evaluate(bank, bank.tokenizer, math, rows, dispatcher=short)


# -- the result -------------------------------------------------------------------------------------------------------
def test_what_cannot_be_judged_counts_as_a_failure_and_is_counted() -> None:
    evaluation = Evaluation(["a", "b", "c", "d"], [1.0, -1.0, None, 1.0], ["", "", "", ""])
    assert evaluation.successes == [True, False, False, True]
    assert (evaluation.success, evaluation.unjudged, evaluation.prompts) == (0.5, 1, 4)
    assert evaluation.interval == pytest.approx(wilson_interval(2, 4))


def test_the_interval_holds_the_share_also_where_all_succeed() -> None:
    """48 of 48: rounding once put the upper end at 1 − 1e-16, which cards refuse."""
    for n in range(1, 200):
        evaluation = Evaluation([""] * n, [1.0] * n, [""] * n)
        assert evaluation.interval[0] <= evaluation.success <= evaluation.interval[1] <= 1.0


def test_the_gain_is_paired() -> None:
    base = Evaluation([""] * 8, [1.0, -1.0] * 4, [""] * 8)
    expert = Evaluation([""] * 8, [1.0, 1.0, 1.0, 1.0, 1.0, -1.0, 1.0, -1.0], [""] * 8)
    mean, low, high = expert.gain_over(base)
    assert mean == 0.25
    assert high - mean == pytest.approx(1.959964 * np.std([0, 1, 0, 1, 0, 0, 0, 0], ddof=1) / np.sqrt(8))
    assert mean - low == pytest.approx(high - mean)


@pytest.mark.parametrize(("n", "processes", "samples"), [(7, 2, 1), (5, 3, 2), (2, 4, 1), (6, 1, 3)])
def test_the_parts_of_several_processes_are_put_together(n: int, processes: int, samples: int) -> None:
    answers = [f"{row}.{sample}" for row in range(n) for sample in range(samples)]
    rewards = [1.0 if i % 3 else None for i in range(len(answers))]

    def part(process: int) -> Evaluation:
        own = [i for i in range(len(answers)) if (i // samples) % processes == process]
        return Evaluation([answers[i] for i in own], [rewards[i] for i in own], [answers[i] for i in own], samples)

    whole = Evaluation.interleaved([part(process) for process in range(processes)])
    assert whole == Evaluation(answers, rewards, answers, samples)


def test_reasons_and_plain_successes(bank: ExpertBank, math: Task) -> None:
    rows = math.load("test", 20)
    with bank.base_only() as model:
        found = evaluate(model, bank.tokenizer, math, rows)
        assert evaluate_success(model, bank.tokenizer, math, rows) == found.successes
        assert greedy_answers(model, bank.tokenizer, rows["prompt"], math.max_new_tokens) == found.answers
    for right, reason in zip(found.successes, found.reasons, strict=True):
        assert reason.startswith("right: " if right else "wrong: ")


@pytest.fixture
def broken_rewards() -> Iterator[Callable[..., list[float]]]:
    yield lambda completions, **kwargs: [1.0]


def test_mistakes_are_named(bank: ExpertBank, math: Task, broken_rewards: Callable[..., list[float]]) -> None:
    rows = math.load("test", 3)
    for options, message in (
        ({"samples": 2}, "set a `temperature`"),
        ({"temperature": -1.0}, "`temperature` is 0"),
        ({"batch_size": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(bank.model, bank.tokenizer, math, rows, **options)
    with pytest.raises(ValueError, match="dataset is empty"):
        evaluate(bank.model, bank.tokenizer, math, rows.select([]))
    with pytest.raises(ValueError, match="gave 1 rewards for 3 answers"):
        evaluate(bank.model, bank.tokenizer, dataclasses.replace(math, reward=broken_rewards), rows)
