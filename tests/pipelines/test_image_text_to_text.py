"""Images and texts in one batch, each row under its own expert, on random models of two architectures."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLProcessor,
    pipeline,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.pipelines.pt_utils import KeyDataset

from peft_svf import ExpertBank, SVFConfig, Transformer2ImageTextToTextPipeline


CHARACTERS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<start>", "<stop>", "<video>"]
CHARACTERS += [*(chr(code) for code in range(32, 127)), "\n"]
IMAGE, START, STOP, VIDEO = range(4, 8)
# like many vision-language templates, this one knows contents only as lists of parts
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{% for part in m['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if shout %}!{% endif %}{% endif %}"
)
SHAPE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
LANGUAGE_ONLY = r".*(vision_tower|visual|multi_modal_projector).*"


def build_tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"<[a-z]+>|[\s\S]"), behavior="isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="right",  # as many processors come
        additional_special_tokens=CHARACTERS[4:8],
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )


def build_llava() -> tuple[Any, ProcessorMixin]:
    size = {"height": 16, "width": 16}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, crop_size=size),
        tokenizer=build_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=32, **SHAPE),
        text_config=LlamaConfig(
            vocab_size=len(CHARACTERS), initializer_range=0.2, max_position_embeddings=1024, pad_token_id=0, **SHAPE
        ),
        image_token_index=IMAGE,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.multi_modal_projector.linear_2.weight.data.mul_(30)  # so that what is seen matters
    return model.eval(), processor


class QwenProcessorWithoutVideos(Qwen2VLProcessor):
    """Its video processor needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        self.image_token, self.image_token_id = tokenizer.image_token, tokenizer.image_token_id
        self.video_token, self.video_token_id = tokenizer.video_token, tokenizer.video_token_id
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def build_qwen() -> tuple[Any, ProcessorMixin]:
    """Pixels of all images packed into rows, positions of three dimensions that the model remembers."""
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=1, size={"shortest_edge": 64, "longest_edge": 400}
    )
    processor = QwenProcessorWithoutVideos(
        images, build_tokenizer(), TEMPLATE.replace("IMAGE", "<start><image><stop>")
    )
    eyes = {"hidden_size": 16, "intermediate_size": 24, "depth": 2, "num_heads": 2, "patch_size": 4}
    eyes |= {"temporal_patch_size": 1, "window_size": 16, "out_hidden_size": 32, "fullatt_block_indexes": [1]}
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 2]}
    text = {**SHAPE, "vocab_size": len(CHARACTERS), "max_position_embeddings": 1024, "rope_parameters": rope}
    text |= {"initializer_range": 0.2, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    config = Qwen2_5_VLConfig(
        vision_config=eyes,
        text_config={**text, "pad_token_id": 0},
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=STOP,
        video_token_id=VIDEO,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval(), processor


BUILDERS: dict[str, Callable[[], tuple[Any, ProcessorMixin]]] = {"LLaVA": build_llava, "Qwen2.5-VL": build_qwen}


def build_model(kind: str, exclude: str | None = LANGUAGE_ONLY) -> tuple[PeftModel, ProcessorMixin]:
    """A random model with the experts math and code, which never stops early, and its processor."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base, processor = BUILDERS[kind]()
    base.generation_config.eos_token_id = None
    model = get_peft_model(base, SVFConfig(exclude_modules=exclude), adapter_name="math")
    model.add_adapter("code", SVFConfig(exclude_modules=exclude))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "svf_offset" in name:
            parameter.data.normal_(std=0.7, generator=generator)
    return model, processor


@pytest.fixture(scope="module")
def vision() -> Callable[..., tuple[PeftModel, ProcessorMixin]]:
    """`vision(kind, exclude)`: a model and its processor, built once for all tests of this file."""
    return functools.cache(build_model)


@pytest.fixture(scope="module")
def pipe(vision) -> Transformer2ImageTextToTextPipeline:
    model, processor = vision("LLaVA")
    return Transformer2ImageTextToTextPipeline(ExpertBank(model, processor), dispatcher="prompt", max_new_tokens=5)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8))


def chat(text: str, *images: Any) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def answer(record: dict[str, Any]) -> str:
    text = record["generated_text"]
    return text if isinstance(text, str) else text[-1]["content"]


@torch.no_grad()
def by_hand(model: PeftModel, processor: Any, text: str, images: list[Any], expert: str) -> str:
    """One prompt by PEFT's `set_adapter` and one `generate`."""
    rendered = processor.apply_chat_template(chat(text, *images), add_generation_prompt=True)
    inputs = processor(text=[rendered], images=[images] if images else None, return_tensors="pt")
    model.eval()
    with model.disable_adapter() if expert == "others" else contextlib.nullcontext():
        if expert != "others":
            model.set_adapter(expert)
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("kind", "exclude"), [("LLaVA", LANGUAGE_ONLY), ("LLaVA", None), ("Qwen2.5-VL", LANGUAGE_ONLY)]
)
def test_one_batch_of_texts_and_images_answers_as_each_prompt_alone_by_hand(vision, kind, exclude):
    model, processor = vision(kind, exclude)
    pipe = Transformer2ImageTextToTextPipeline(model, processor=processor, max_new_tokens=5)
    rows = [
        ("1 + 2", [picture(0)], "math"),
        ("a text alone, longer than the others", [], "code"),
        ("7", [picture(1), picture(2)], "code"),
        ("1 + 2", [picture(0)], "others"),
        ("1 + 2", [picture(0)], "code"),
    ]
    prompts: list[Any] = [{"text": text, "images": images, "expert": name} for text, images, name in rows]
    prompts[4] = {"messages": chat("1 + 2", picture(0)), "expert": "code"}
    mixture = {"text": "1 + 2", "images": picture(0), "expert": {"math": 0.5, "code": 0.5}}
    records = pipe([*prompts, mixture], batch_size=6)
    expected = [by_hand(model, processor, *row) for row in rows]
    assert [answer(record) for (record,) in records[:5]] == expected
    assert [record["expert"] for (record,) in records] == ["math", "code", "code", "others", "code", "mixture"]
    assert answer(records[5][0]) == answer(pipe(mixture)[0])
    assert len({answer(record) for (record,) in records}) >= 5  # experts and images matter


def test_the_first_pass_reads_the_text_and_not_the_images(vision):
    model, processor = vision("LLaVA")
    asked: list[Any] = []

    def route(prompts: list[Any]) -> list[str]:
        asked.extend(prompts)
        return ["code"] * len(prompts)

    pipe = Transformer2ImageTextToTextPipeline(model, processor=processor, dispatcher=route, max_new_tokens=2)
    image = picture(0)
    pipe([{"text": "one", "images": image}, {"messages": chat("two", image)}, "three"], batch_size=3)
    assert asked == ["one", chat("two", image), "three"]


def test_scores_are_those_of_the_language_model_after_instruction_and_text(pipe):
    (record,) = pipe(picture(0), text="1 + 2", max_new_tokens=1)
    template = pipe.dispatcher.scorer.template
    asked = template.render("1 + 2")
    assert "Classify" in asked and "[user]1 + 2" in asked  # its template knows contents only as parts
    scores = []
    for label in ("math", "code", "others"):
        head, tail = template.encode("1 + 2"), template.label_ids(label)
        with pipe.bank.base_only() as base, torch.no_grad():
            logits = base(input_ids=torch.tensor([[*head, *tail]])).logits[0].double().log_softmax(-1)
        scores.append(sum(float(logits[len(head) - 1 + i, token]) for i, token in enumerate(tail)))
    expected = torch.tensor(scores).softmax(0).tolist()
    assert list(record["scores"].values()) == pytest.approx(expected, abs=1e-4)
    assert answer(record)[:1] == answer(pipe(picture(0), text="1 + 2", expert=record["expert"], max_new_tokens=1)[0])


def test_a_call_takes_prompts_in_every_form(pipe, tmp_path):
    image = picture(0)
    image.save(tmp_path / "image.png")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    url = {"type": "image_url", "image_url": {"url": str(tmp_path / "image.png")}}
    options = {"expert": "math", "max_new_tokens": 4}
    wanted = answer(pipe({"text": "What?", "images": image}, **options)[0])
    assert answer(pipe(image, text="What?", **options)[0]) == wanted
    assert answer(pipe(str(tmp_path / "image.png"), text="What?", **options)[0]) == wanted
    assert answer(pipe(encoded, text="What?", **options)[0]) == wanted
    assert answer(pipe(chat("What?", image), **options)[0]) == wanted
    assert answer(pipe(text=chat("What?", image), **options)[0]) == wanted
    assert answer(pipe([{"role": "user", "content": [url, chat("What?")[0]["content"][0]]}], **options)[0]) == wanted
    for batch in (
        pipe([image, [image]], text=["What?", "What?"], batch_size=2, **options),
        pipe([chat("What?", image), chat("What?", image)], **options),
        list(pipe(({"text": "What?", "images": image} for _ in range(2)), batch_size=2, **options)),
        list(pipe(KeyDataset([{"prompt": {"text": "What?", "images": image}}] * 2, "prompt"), **options)),
    ):
        assert [answer(record) for (record,) in batch] == [wanted, wanted]
    assert answer(pipe("What?", **options)[0]) == answer(pipe(text=["What?"], **options)[0][0]) != wanted


def test_generation_arguments_of_a_call_reach_generate_and_template_variables_the_template(pipe):
    image = picture(0)
    assert len(pipe(image, text="What?", max_new_tokens=3, min_new_tokens=3, expert="math")) == 1
    records = pipe(image, text="What?", num_beams=3, num_return_sequences=2, max_new_tokens=3, expert="math")
    assert len({answer(record) for record in records}) == 2
    torch.manual_seed(0)
    sampled = {answer(pipe("What?", do_sample=True, temperature=5.0, expert="math")[0]) for _ in range(3)}
    assert len(sampled) > 1
    assert answer(pipe("What?", generate_kwargs={"do_sample": False}, expert="math")[0]) == answer(
        pipe("What?", expert="math")[0]
    )
    plain, shouted = (pipe.preprocess("What?", **options)["rendered"] for options in ({}, {"shout": True}))
    assert shouted == plain + "!"
    full = pipe("What?", expert="math", return_full_text=True)[0]["generated_text"]
    assert full == "What?" + answer(pipe("What?", expert="math")[0])
    with pytest.raises(ValueError, match=r"Unknown argument 'max_new_token'.*processor_kwargs"):
        pipe("What?", max_new_token=3)


def test_a_chat_that_ends_with_the_assistant_is_continued(pipe):
    messages = [*chat("What?", picture(0)), {"role": "assistant", "content": "It is"}]
    (record,) = pipe(messages, expert="math", max_new_tokens=3)
    (part,) = record["generated_text"][-1]["content"]
    assert part["text"].startswith("It is") and len(part["text"]) > len("It is")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe(), "nothing to answer"),
        (lambda pipe: pipe([]), "nothing to answer"),
        (lambda pipe: pipe(picture(0)), "An image alone is no question"),
        (lambda pipe: pipe({"images": picture(0)}), "needs 'text' or 'messages'"),
        (lambda pipe: pipe([picture(0)], text=["a", "b"]), "There are 2 texts"),
        (lambda pipe: pipe(picture(0), text=chat("a")), "a chat holds its images itself"),
        (lambda pipe: pipe({"messages": chat("a"), "images": picture(0)}), "A chat holds its images"),
        (lambda pipe: pipe(chat("a", None)), "An image of the chat has none of"),
        (lambda pipe: pipe([{"role": "user", "content": [{"type": "video", "url": "x"}]}]), "not 'video'"),
        (lambda pipe: pipe("nowhere.png", text="a"), "nowhere.png"),
        (lambda pipe: pipe(picture(0), text="a" * 1100, expert="math"), "tokens with its images"),
        (lambda pipe: pipe("a", expert="maths"), "Unknown expert 'maths'"),
    ],
)
def test_what_cannot_be_answered_gets_a_clear_error(pipe, call, message):
    with pytest.raises(ValueError, match=message):
        call(pipe)


def test_the_default_number_of_new_tokens_yields_to_the_context(pipe):
    prompt = {"text": "a" * 990, "images": picture(0), "expert": "math"}
    (record,) = Transformer2ImageTextToTextPipeline(pipe.bank)(prompt, return_tensors=True)
    assert len(record["generated_token_ids"]) == 1024
    with pytest.raises(ValueError, match=r"tokens with its images and max_new_tokens is 40.*; pass max_new_tokens="):
        pipe(prompt, max_new_tokens=40)


def test_a_model_without_a_processor_is_refused(vision):
    model, processor = vision("LLaVA")
    with pytest.raises(ValueError, match="no processor for images"):
        Transformer2ImageTextToTextPipeline(ExpertBank(model, processor.tokenizer))
    with pytest.raises(ValueError, match="instead of tokenizer"):
        Transformer2ImageTextToTextPipeline(model, tokenizer=processor.tokenizer)
    with pytest.raises(ValueError, match="no default model; pass model="):
        pipeline("transformer2-image-text-to-text")


def test_a_saved_pipeline_is_loaded_with_its_processor_and_answers_alike(pipe, tmp_path):
    folder = pipe.save_pretrained(tmp_path / "bank")
    loaded = pipeline(model=str(folder), max_new_tokens=5)  # the task is read from the folder
    assert type(loaded) is Transformer2ImageTextToTextPipeline
    assert isinstance(loaded.bank.base_model, LlavaForConditionalGeneration)
    prompts = [{"text": "What?", "images": picture(0)}, "1 + 2", {"text": "x", "images": picture(1), "expert": "code"}]
    for (record,), (expected,) in zip(loaded(prompts, batch_size=3), pipe(prompts, batch_size=3), strict=True):
        assert answer(record) == answer(expected)
        assert record["expert"] == expected["expert"]
