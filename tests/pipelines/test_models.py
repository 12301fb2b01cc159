"""What a pipeline can be made of: adapters in every shape, quantized bases, dtypes and device maps."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TextGenerationPipeline, pipeline

from peft_svf import ExpertBank, SVFConfig, Transformer2Pipeline
from peft_svf.experts import ExpertBankError
from peft_svf.pipelines import wrapping
from peft_svf.playground import BANK_FOLDER
from peft_svf.tuner import bases
from peft_svf.tuner.layer import SVFLayer


QUESTION = "Tom has 23 apples and buys 18 more. How many apples does Tom have?"
PROMPTS = [QUESTION, "What is bigger, a mouse or a house?"]
TASK = "transformer2-generation"


@pytest.fixture(scope="module")
def playground() -> ExpertBank:
    return ExpertBank.from_pretrained(BANK_FOLDER)


def save_adapter(model: PeftModel, folder: Path, base: Path | str = BANK_FOLDER / "base", name: str = "math") -> str:
    """An adapter repository: one adapter at the root of a folder, which names its base."""
    model.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
    inner = folder if name == "default" else folder / name
    config = json.loads((inner / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
    (inner / "adapter_config.json").write_text(json.dumps(config))
    return str(inner)


def texts(records: list) -> list[str]:
    return [record["generated_text"] for (record,) in records]


def fill(model: PeftModel) -> PeftModel:
    """Random offsets, others for every adapter."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "svf_offset" in name:
            parameter.data.normal_(std=0.5, generator=generator)
    return model


@pytest.fixture(scope="module")
def adapter(playground: ExpertBank, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_adapter(playground.model, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def ordinary_answers(adapter: str) -> list[str]:
    """What transformers' own pipeline answers with the adapter of a repository."""
    stock = pipeline("text-generation", model=adapter)
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    return texts(stock(chats, max_new_tokens=12, do_sample=False, return_full_text=False))


@pytest.fixture
def moved_bases(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Of each model that got a PeftModel around it, the layers whose singular basis is not the one they had."""
    moved, around = [], wrapping.peft_model_around

    def bases_of(model: torch.nn.Module) -> dict:
        return {name: module.svf_basis for name, module in model.named_modules() if isinstance(module, SVFLayer)}

    def watch(model: torch.nn.Module) -> PeftModel:
        before = bases_of(model)
        wrapped = around(model)
        after = bases_of(model)
        assert before.keys() == after.keys() != set()
        moved.append([name for name, basis in before.items() if after[name] is not basis])
        return wrapped

    monkeypatch.setattr(wrapping, "peft_model_around", watch)
    return moved


@pytest.mark.parametrize("form", ["pipeline", "class"])
def test_an_adapter_repository_answers_as_in_the_ordinary_pipeline(
    adapter, ordinary_answers, playground, moved_bases, form
):
    make = Transformer2Pipeline if form == "class" else partial(pipeline, TASK)
    pipe = make(model=adapter, max_new_tokens=12)
    assert moved_bases == [[]]
    assert isinstance(pipe.model, PeftModel)
    records = pipe(PROMPTS, batch_size=2)
    assert texts(records) == ordinary_answers
    assert [record["expert"] for (record,) in records] == ["default", "default"]  # nobody named it: no first pass
    (base,) = Transformer2Pipeline(playground, max_new_tokens=12)(PROMPTS[0], expert="others")
    assert pipe(PROMPTS[0], expert="others")[0]["generated_text"] == base["generated_text"] != ordinary_answers[0]


def test_a_repository_that_holds_its_basis_is_never_decomposed(tiny_llama, character_tokenizer, tmp_path, monkeypatch):
    base = tiny_llama(vocab_size=100)
    base.save_pretrained(tmp_path / "base")
    character_tokenizer.save_pretrained(tmp_path / "base")
    model = fill(get_peft_model(base, SVFConfig(task_type="CAUSAL_LM", save_basis=True)))
    adapter = save_adapter(model, tmp_path / "adapter", tmp_path / "base", "default")
    expected = Transformer2Pipeline(model, character_tokenizer, max_new_tokens=6)("2+2?")

    def refuse(*args: object) -> None:
        raise AssertionError("decomposed again")

    monkeypatch.setattr(bases, "cached_singular_basis", refuse)
    assert pipeline(TASK, model=adapter, max_new_tokens=6)("2+2?") == expected


def test_several_adapters_in_a_plain_model_become_experts(playground):
    model = AutoModelForCausalLM.from_pretrained(BANK_FOLDER / "base")
    for name in ("math", "reasoning"):
        model.load_adapter(str(BANK_FOLDER / name), adapter_name=name)
    pipe = pipeline(TASK, model=model, dispatcher="others", max_new_tokens=12)
    prompts = [{"text": QUESTION, "expert": name} for name in ("math", "reasoning", "others")]
    answers = texts(pipe(prompts, batch_size=3))
    assert answers == texts(Transformer2Pipeline(playground, max_new_tokens=12)(prompts, batch_size=3))
    assert answers[0] != answers[2]
    assert not any(parameter.requires_grad for parameter in pipe.model.parameters())


def test_a_model_without_a_task_type_works(tiny_llama, character_tokenizer):
    model = get_peft_model(tiny_llama(vocab_size=100), SVFConfig(), adapter_name="math")
    model.add_adapter("code", SVFConfig())
    fill(model)
    assert type(model) is PeftModel
    assert model.training
    pipe = Transformer2Pipeline(model, character_tokenizer, dispatcher="math", max_new_tokens=6)
    assert not model.training  # get_peft_model leaves it in training mode, in which PEFT refuses mixed batches
    records = pipe(["ab", {"text": "c", "expert": "code"}, {"text": "ab", "expert": "others"}], batch_size=3)
    model.set_adapter("code")
    inputs = character_tokenizer("[user]c\n[assistant]", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert texts(records)[1] == character_tokenizer.decode(ids, skip_special_tokens=True)
    assert len(set(texts(records))) == 3


@pytest.mark.parametrize("form", ["object", "folder", "class"])
def test_a_lora_is_refused_by_name(tmp_path, form):
    model = AutoModelForCausalLM.from_pretrained(BANK_FOLDER / "base")
    lora = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))
    with pytest.raises(ExpertBankError, match="LORA") as error:
        if form == "object":
            pipeline(TASK, model=lora)
        elif form == "folder":
            pipeline(TASK, model=save_adapter(lora, tmp_path, name="default"))
        else:
            Transformer2Pipeline(save_adapter(lora, tmp_path, name="default"))
    assert "SVF" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bits", [8, 4])
def test_experts_on_a_quantized_base(tiny_llama, character_tokenizer, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    tiny_llama(vocab_size=100, hidden_size=64).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    model = get_peft_model(base, SVFConfig(task_type="CAUSAL_LM"), adapter_name="a")
    model.add_adapter("b", SVFConfig(task_type="CAUSAL_LM"))
    pipe = Transformer2Pipeline(fill(model), character_tokenizer, dispatcher="others", max_new_tokens=6)
    prompts = [{"text": "2+2?", "expert": expert} for expert in ("a", "b", {"a": 0.5, "b": 0.5}, "others")]
    answers = texts(pipe(prompts, batch_size=4))
    inputs = character_tokenizer("[user]2+2?\n[assistant]", return_tensors="pt")
    for name, answer in zip("ab", answers, strict=False):
        model.set_adapter(name)
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer == character_tokenizer.decode(ids, skip_special_tokens=True)
    assert len(set(answers)) == 4


def test_dtype_and_device_map_of_the_call_reach_the_base_model():
    pipe = pipeline(TASK, model=str(BANK_FOLDER), dtype="float64", device_map="auto", max_new_tokens=10)
    assert pipe.bank.base_model.dtype == torch.float64
    assert pipe.device == pipe.model.device == torch.device("cpu")
    assert pipe(QUESTION)[0]["expert"] == "math"
    split = AutoModelForCausalLM.from_pretrained(BANK_FOLDER / "base")
    layers = {f"model.layers.{i}": i % 2 for i in range(4)}
    split.hf_device_map = {"model.embed_tokens": "cpu", **layers, "model.norm": 0, "lm_head": 0}
    assert Transformer2Pipeline(split).device == torch.device("cpu")  # where the first part is
    with pytest.raises(ValueError, match="discard the `device` argument"):
        Transformer2Pipeline(split, device="cpu")


@pytest.mark.parametrize("expert", ["math", {"math": 0.5, "reasoning": 0.5}])
def test_an_assistant_model_changes_the_speed_and_not_the_answer(playground, expert):
    assistant = AutoModelForCausalLM.from_pretrained(BANK_FOLDER / "base")
    calls = []
    assistant.register_forward_hook(lambda *_: calls.append(1))
    pipe = Transformer2Pipeline(playground, assistant_model=assistant, max_new_tokens=8)
    plain = Transformer2Pipeline(playground, max_new_tokens=8)
    assert pipe(QUESTION, expert=expert) == plain(QUESTION, expert=expert)
    assert calls


def test_an_unpaddable_tokenizer_is_given_a_pad_token(tiny_llama, add_experts, character_tokenizer):
    answers = {}
    for token in ("<pad>", "</s>", None):
        model = add_experts(tiny_llama(vocab_size=100))
        character_tokenizer.pad_token = token if token == "<pad>" else None
        character_tokenizer.eos_token = None if token is None else "</s>"
        pipe = Transformer2Pipeline(model, character_tokenizer, dispatcher="math", max_new_tokens=6)
        answers[token] = texts(pipe(["a", "much longer"], batch_size=2))
        assert character_tokenizer.pad_token == (token or "<pad>")
    assert answers["<pad>"] == answers["</s>"] == answers[None]


def test_a_tokenizer_of_another_name_is_loaded_and_leaves_the_bank_as_it_was(playground):
    own = playground.tokenizer
    pipe = Transformer2Pipeline(playground, tokenizer=str(BANK_FOLDER / "base"))
    assert pipe.tokenizer is pipe.bank.tokenizer is not own
    assert playground.tokenizer is own
    assert pipe.bank.experts == playground.experts
    assert pipe.bank.instruction == playground.instruction


def test_no_false_alarm_about_an_unsupported_model(playground, caplog):
    pipeline(TASK, model=playground)
    assert "not supported" not in caplog.text
    assert isinstance(AutoTokenizer.from_pretrained(BANK_FOLDER / "base"), type(playground.tokenizer))
    assert issubclass(Transformer2Pipeline, TextGenerationPipeline)


def test_one_expert_of_a_bank_finds_the_base_beside_it() -> None:
    prompt = "Ron has 60 eggs and gives 19 to Dan. How many eggs does Ron have left?"
    alone = Transformer2Pipeline(BANK_FOLDER / "math")
    (record,) = alone(prompt)
    (expected,) = Transformer2Pipeline(BANK_FOLDER)(prompt, expert="math")
    assert record["generated_text"] == expected["generated_text"] == "10-9=1, 5-1=4, so 41"
    assert alone.model.peft_config["default"].base_model_name_or_path == str(BANK_FOLDER / "base")
