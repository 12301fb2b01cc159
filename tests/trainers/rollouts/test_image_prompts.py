"""Vision-language models of four kinds: what is adapted, scores against the model's own forward, and training."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from peft import get_peft_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, ProcessorMixin, Qwen2VLProcessor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from trl.data_utils import prepare_multimodal_messages

from peft_svf import SVFConfig
from peft_svf.trainers import SVFPolicyGradientTrainer
from peft_svf.trainers.rollouts.decoding import decoding_temperature
from peft_svf.trainers.rollouts.image_prompts import check_processor
from peft_svf.trainers.tasks import get_task


MakeVLM = Callable[..., Any]

WORDS = ["<pad>", "<unk>", "<|end|>", "<|user|>", "<|assistant|>", *map(str, range(20)), "+", "=", "?"]
SPECIAL = [
    "<image>",
    "<start>",
    "<stop>",
    "<video>",
    "<fake_token_around_image>",
    "<end_of_utterance>",
]
IMAGE, START, STOP, VIDEO = range(len(WORDS), len(WORDS) + 4)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}PLACEHOLDER {% else %}{{ part['text'] }} {% endif %}{% endfor %}<|end|> "
    "{% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
TEXT: dict[str, Any] = {
    "vocab_size": len(WORDS) + len(SPECIAL),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EYES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
PINPOINTS = [[8, 16], [16, 8], [16, 16]]
PER_TOKEN = ("token_type_ids", "mm_token_type_ids")


# -- tiny models ------------------------------------------------------------------------------------------------------
def build_tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*WORDS, *SPECIAL])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|end|>",
        padding_side="right",  # the trainer has to pad on the left all the same
        model_input_names=["input_ids", "attention_mask"],
        additional_special_tokens=SPECIAL,
        extra_special_tokens={
            "image_token": "<image>", "boi_token": "<start>", "eoi_token": "<stop>", "video_token": "<video>"
        },
    )  # fmt: skip


class QwenProcessorWithoutVideos(Qwen2VLProcessor):
    """Its video processor needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        self.image_token, self.image_token_id = tokenizer.image_token, tokenizer.image_token_id
        self.video_token, self.video_token_id = tokenizer.video_token, tokenizer.video_token_id
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def llava_next() -> tuple[str, dict[str, Any], Any]:
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, image_grid_pinpoints=PINPOINTS
    )
    processor = transformers.LlavaNextProcessor(
        images, build_tokenizer(), 4, "default", CHAT_TEMPLATE.replace("PLACEHOLDER", "<image>"), "<image>", 1
    )
    config = {
        "vision_config": {"model_type": "clip_vision_model", **EYES, "num_hidden_layers": 3, "image_size": 8},
        "text_config": {"model_type": "llama", **TEXT},
        "image_token_index": IMAGE,
        "image_grid_pinpoints": PINPOINTS,
    }
    return "LlavaNext", config, processor


def qwen2_5_vl() -> tuple[str, dict[str, Any], Any]:
    """Packed pixels, positions of three dimensions."""
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=1, size={"shortest_edge": 64, "longest_edge": 400}
    )
    template = CHAT_TEMPLATE.replace("PLACEHOLDER", "<start> <image> <stop>")
    eyes = {"depth": 2, "num_heads": 2, "temporal_patch_size": 1, "window_size": 16, "out_hidden_size": 32}
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 2]}
    config = {
        "vision_config": {**EYES, **eyes, "fullatt_block_indexes": [1]},
        "text_config": {**TEXT, "rope_parameters": rope},
        "image_token_id": IMAGE,
        "vision_start_token_id": START,
        "vision_end_token_id": STOP,
        "video_token_id": VIDEO,
    }
    return "Qwen2_5_VL", config, QwenProcessorWithoutVideos(images, build_tokenizer(), template)


def gemma3() -> tuple[str, dict[str, Any], Any]:
    """Attention in both directions within an image, which `token_type_ids` mark."""
    processor = transformers.Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 16, "width": 16}),
        build_tokenizer(),
        CHAT_TEMPLATE.replace("PLACEHOLDER", "<start>"),
        image_seq_length=4,
    )
    config = {
        "vision_config": {"model_type": "siglip_vision_model", **EYES, "image_size": 16, "vision_use_head": False},
        "text_config": {**TEXT, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
    }
    return "Gemma3", config, processor


def idefics3() -> tuple[str, dict[str, Any], Any]:
    """Pixels padded to one row per prompt, with a mask."""
    processor = transformers.Idefics3Processor(
        Idefics3ImageProcessorPil(
            size={"longest_edge": 16}, max_image_size={"longest_edge": 16}, do_image_splitting=False
        ),
        build_tokenizer(),
        image_seq_len=4,
        chat_template=CHAT_TEMPLATE.replace("PLACEHOLDER", "<image>"),
    )
    config = {
        "vision_config": {**EYES, "image_size": 16},
        "text_config": {"model_type": "llama", **TEXT},
        "image_token_id": IMAGE,
        "scale_factor": 2,
    }
    return "Idefics3", config, processor


KINDS = {"LLaVA-NeXT": llava_next, "Qwen2.5-VL": qwen2_5_vl, "Gemma 3": gemma3, "Idefics 3": idefics3}


def build(kind: str) -> tuple[Any, Any]:
    """Model and processor."""
    name, options, processor = KINDS[kind]()
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(4.0) if parameter.any() else parameter.normal_()  # Gemma 3 starts blind
    return model, processor


def picture(seed: int) -> Image.Image:
    width, height = [(8, 16), (20, 10), (9, 9), (16, 16), (30, 12)][seed % 5]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def questions(n: int, counts: tuple[int, ...] = (1,)) -> Dataset:
    """Prompts of different lengths, with as many images as `counts` says in turn."""
    rows = []
    for i in range(n):
        text = f"{i % 10} + {i % 7} = ?" + " 1 2 3" * (i % 3)
        images = [picture(10 * i + j) for j in range(counts[i % len(counts)])]
        rows.append({"prompt": [{"role": "user", "content": text}], "images": images})
    return Dataset.from_list(rows)


@pytest.fixture
def make_vlm(make_trainer: Callable[..., SVFPolicyGradientTrainer], tiny: SimpleNamespace) -> MakeVLM:
    def make(kind: str, dataset: Dataset, arguments: dict[str, Any] | None = None, **options: Any) -> Any:
        model, processor = build(kind)
        defaults = {"model": model, "processing_class": processor, "train_dataset": dataset, "eval_dataset": dataset}
        trainer = make_trainer(
            {**defaults, **(arguments or {})}, **{"per_device_train_batch_size": 8, "kl_coef": 0.1, **options}
        )
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        return trainer

    return make


# -- one answer at a time, by the model itself ------------------------------------------------------------------------
def own_inputs(trainer: Any, row: dict[str, Any]) -> dict[str, Tensor]:
    messages = prepare_multimodal_messages(row["prompt"], images=row["images"])
    text = trainer.processing_class.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    images = [row["images"]] if row["images"] else None
    return dict(trainer.processing_class(images=images, text=[text], return_tensors="pt"))


@torch.no_grad()
def own_log_probs(trainer: Any, row: dict[str, Any], answer: Tensor) -> Tensor:
    inputs = own_inputs(trainer, row)
    length = inputs["input_ids"].size(1)
    for name in PER_TOKEN:
        if name in inputs:
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, len(answer)))
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer.unsqueeze(0)], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    log_probs = trainer.model(**inputs).logits[0, length - 1 : -1].log_softmax(-1)
    return log_probs.gather(-1, answer.unsqueeze(-1)).squeeze(-1)


def own_greedy_answer(trainer: Any, row: dict[str, Any], length: int) -> list[int]:
    inputs = own_inputs(trainer, row)
    # TRL never lets a model say the placeholder of an image.
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "suppress_tokens": [IMAGE]}
    answer = trainer.model.generate(**inputs, **options)[0, inputs["input_ids"].size(1) :]
    return answer[:length].tolist()


def scores(trainer: Any, batch: dict[str, Any]) -> list[Tensor]:
    """Log-probabilities of each answer of a batch of the trainer's."""
    valid = batch["completion_mask"].bool()
    with torch.no_grad():
        return list(trainer._score(trainer.model, batch, valid).log_probs.split(valid.sum(1).tolist()))


@pytest.mark.parametrize("counts", [(1,), (2, 0, 1)], ids=["one image", "none to two"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_answers_are_the_model_s_own(
    make_vlm: MakeVLM, tiny: SimpleNamespace, kind: str, counts: tuple[int, ...]
) -> None:
    trainer = make_vlm(kind, questions(8, counts))
    tiny.randomize_offsets(trainer.model)
    rows = list(trainer.train_dataset)
    with decoding_temperature(trainer, 0.0):
        batch = trainer._generate_and_score_completions(rows)
    assert batch["prompt_mask"].sum(1).unique().numel() > 1, "prompts have to be padded"
    for i, (row, scored) in enumerate(zip(rows, scores(trainer, batch), strict=True)):
        answer = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
        torch.testing.assert_close(scored, own_log_probs(trainer, row, answer), rtol=0, atol=1e-4)
        assert own_greedy_answer(trainer, row, len(answer)) == answer.tolist()
    other = {**batch, "pixel_values": batch["pixel_values"].flip(-1)}
    assert any(not torch.allclose(a, b) for a, b in zip(scores(trainer, batch), scores(trainer, other), strict=True))


@pytest.mark.parametrize("counts", [(1,), (2, 0, 0, 1, 2)], ids=["one image", "none to two"])
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_keep_images_with_their_prompts(
    make_vlm: MakeVLM, tiny: SimpleNamespace, kind: str, counts: tuple[int, ...]
) -> None:
    """As TRL shuffles and splits a generation batch: every answer is scored with its own images."""
    dataset = questions(10, counts)
    trainer = make_vlm(kind, dataset, per_device_train_batch_size=2, gradient_accumulation_steps=5)
    tiny.randomize_offsets(trainer.model)
    by_prompt = {tuple(own_inputs(trainer, row)["input_ids"][0].tolist()): row for row in dataset}
    assert len(by_prompt) == 10
    rows = list(dataset)
    for step in range(5):
        trainer._step = step
        batch = trainer._prepare_inputs(rows)
        assert len(batch["prompt_ids"]) == 2
        for i, scored in enumerate(scores(trainer, batch)):
            row = by_prompt.pop(tuple(batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist()))
            answer = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
            torch.testing.assert_close(scored, own_log_probs(trainer, row, answer), rtol=0, atol=1e-4)
    assert not by_prompt


@pytest.mark.parametrize("kind", ["LLaVA-NeXT", "Qwen2.5-VL"])
def test_gradient_of_micro_batches_is_that_of_the_whole(make_vlm: MakeVLM, kind: str) -> None:
    after = []
    for per_device, accumulation in [(4, 1), (2, 2), (1, 4)]:
        trainer = make_vlm(
            kind,
            questions(4, (1, 2)),
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            optim="sgd",  # AdamW blows up the rounding of gradients near 0
            learning_rate=1.0,
            max_grad_norm=1e9,
        )
        trainer.train()
        after.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]))
    for other in after[1:]:
        assert (after[0] - other).norm() < 1e-4 * after[0].norm()


@pytest.mark.parametrize("kind", KINDS)
def test_training_changes_the_language_model_s_offsets_only(make_vlm: MakeVLM, kind: str) -> None:
    trainer = make_vlm(kind, questions(16, (1, 1, 2)), max_steps=2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        trained = "svf_offset" in name
        assert torch.equal(parameter, before[name]) != trained, name
        assert not trained or "language_model" in name or "text_model" in name
    assert trainer.state.log_history[0]["kl"] == 0.0 and trainer.state.log_history[1]["kl"] > 0.0
    evaluations = [trainer.evaluate()["eval_reward"] for _ in range(2)]
    assert evaluations[0] == evaluations[1]


def test_gradient_checkpointing(make_vlm: MakeVLM) -> None:
    trainer = make_vlm("LLaVA-NeXT", questions(8), max_steps=1, gradient_checkpointing=True)
    trainer.train()
    assert all(p.abs().max() > 0 for p in trainer.model.parameters() if p.requires_grad)


def test_a_column_of_single_images_some_of_them_missing(make_vlm: MakeVLM) -> None:
    rows = questions(8).to_list()
    images: list[Any] = [None if i % 3 else picture(i) for i in range(8)]
    dataset = Dataset.from_list(
        [{"prompt": row["prompt"], "image": image} for row, image in zip(rows, images, strict=True)]
    )
    trainer = make_vlm("LLaVA-NeXT", dataset, {"eval_dataset": None})
    batch = trainer._generate_and_score_completions(list(dataset))
    assert batch["num_images"] == [1, 0, 0, 1, 0, 0, 1, 0]
    without = trainer._generate_and_score_completions(list(dataset.select([1, 2])))
    assert "pixel_values" not in without and len(scores(trainer, without)) == 2


# -- what is adapted --------------------------------------------------------------------------------------------------
def adapted(trainer: Any) -> set[str]:
    """Names of the adapted layers."""
    marker = ".svf_offset.default.weight"
    names = (name for name, p in trainer.model.named_parameters() if p.requires_grad)
    return {name.removeprefix("base_model.model.").removesuffix(marker) for name in names}


def test_only_the_language_model_by_path(make_vlm: MakeVLM, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = build("LLaVA-NeXT")
    model.save_pretrained(tmp_path / "model")
    with caplog.at_level(logging.INFO, logger="peft_svf.trainers.rollouts.image_prompts"):
        trainer = make_vlm("LLaVA-NeXT", questions(8), {"model": str(tmp_path / "model")}, max_steps=1)
    decoder = {name for name, m in model.model.language_model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert adapted(trainer) == {f"model.language_model.{name}" for name in decoder} and len(decoder) == 14
    assert "not `model.vision_tower`, `model.multi_modal_projector`" in caplog.text
    trainer.train()
    trainer.save_model()
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    loaded = get_peft_model(build("LLaVA-NeXT")[0], SVFConfig(exclude_modules=saved["exclude_modules"]))
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == set(trainer._start)


@pytest.mark.parametrize(
    ("target", "exclude", "expected"),
    [
        ("all-linear", ["q_proj", "down_proj"], {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}),
        ("all-linear", r".*_proj", None),
        (["linear_1", "gate_proj"], None, {"linear_1", "gate_proj"}),
        (r"model\.vision_tower\..*[01]\.mlp\.fc1", None, {"fc1"}),  # the last layer of the tower has no effect
    ],
)
def test_modules_that_the_user_names(make_vlm: MakeVLM, target: Any, exclude: Any, expected: set[str] | None) -> None:
    config = SVFConfig(target_modules=target, exclude_modules=exclude)
    if expected is None:
        with pytest.raises(ValueError, match="exclude"):
            make_vlm("LLaVA-NeXT", questions(8), {"peft_config": config})
        return
    trainer = make_vlm("LLaVA-NeXT", questions(8), {"peft_config": config}, max_steps=1)
    assert {name.rpartition(".")[2] for name in adapted(trainer)} == expected
    if target == "all-linear":
        assert all(name.startswith("model.language_model.") for name in adapted(trainer))
    trainer.train()
    assert all(p.abs().max() > 0 for p in trainer.model.parameters() if p.requires_grad)


def test_a_model_with_an_adapter_of_its_own_keeps_it(make_vlm: MakeVLM) -> None:
    model = get_peft_model(build("LLaVA-NeXT")[0], SVFConfig())
    trainer = make_vlm("LLaVA-NeXT", questions(8), {"model": model, "peft_config": None})
    assert any("vision_tower" in name for name in adapted(trainer))


# -- what is refused --------------------------------------------------------------------------------------------------
def test_images_without_a_processor(make_vlm: MakeVLM) -> None:
    with pytest.raises(ValueError, match=r"train dataset has images in its column `images`.*AutoProcessor"):
        make_vlm("LLaVA-NeXT", questions(8), {"processing_class": build_tokenizer()})


def test_text_only_with_the_tokenizer(make_vlm: MakeVLM, tiny: SimpleNamespace) -> None:
    tokenizer = tiny.tokenizer()
    trainer = make_vlm("Gemma 3", tiny.prompts(8), {"processing_class": tokenizer}, max_steps=1)
    trainer.train()
    assert all("language_model" in name for name in adapted(trainer))


def test_inputs_that_trl_would_lose(tiny: SimpleNamespace) -> None:
    """Mllama's forward needs the aspect ratios of its tiles."""
    forward = transformers.MllamaForConditionalGeneration.forward
    model: Any = type("Model", (), {"forward": forward, "config": SimpleNamespace(image_token_id=3)})()
    names = ["input_ids", "attention_mask", "pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "num_tiles"]
    with pytest.raises(ValueError, match="takes `aspect_ratio_ids`, `aspect_ratio_mask` with its images"):
        check_processor(SimpleNamespace(model_input_names=names), model)
    for kind in KINDS:
        model, processor = build(kind)
        check_processor(processor, model)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no image token"):
        check_processor(processor, tiny.model())


# -- the paper's task -------------------------------------------------------------------------------------------------
def test_a_step_on_textvqa(make_vlm: MakeVLM, tmp_path: Path) -> None:
    task = get_task("textvqa")
    rows = []
    for i in range(16):
        picture(i).save(tmp_path / f"{i}.png")
        answers = [str((i + j) % 3) for j in range(10)]
        rows.append({"question": f"{i} + 1 = ?", "answers": answers, "question_id": i, "image": f"{i}.png"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = task.load("test", data_files=tmp_path / "rows.jsonl", batch_size=8)
    trainer = make_vlm("LLaVA-NeXT", dataset, {"reward_funcs": task.reward}, max_steps=1)
    trainer.train()
    assert -1.0 <= trainer.state.log_history[0]["reward"] <= 1.0
    assert list(itertools.chain(*trainer._logs["rewards"].values()))
    assert -1.0 <= trainer.evaluate()["eval_reward"] <= 1.0
