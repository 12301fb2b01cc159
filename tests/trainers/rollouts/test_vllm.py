"""vLLM through TRL's own sync, up to a stand-in for the engine: what reaches it, when, and what stays behind.

vLLM needs a GPU and is not installed here. `Engine` takes its place at the lowest seam that leaves TRL's code in
charge: weights arrive by `load_weights` (colocate) or `update_named_params` (server), and answers are drawn from a
model of its own that knows nothing but those weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl.generation import vllm_generation

from peft_svf import SVFConfig
from peft_svf.trainers import SVFPolicyGradientTrainer


MakeTrainer = Callable[..., SVFPolicyGradientTrainer]
EOS = 2


class Engine:
    """A model that is told its weights by name and answers with them.

    Attributes:
        syncs (`list[dict[str, Tensor]]`): What arrived, one dictionary for each sync.
        temperatures (`list[float]`): Of every generate call.
        fails_after (`int`, *optional*): Raise when this many tensors of a sync have arrived.
        bias (`float`): Added to every log-probability that is reported, as if the engine computed another policy.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = copy.deepcopy(model).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(float("nan"))  # whatever does not arrive makes answers impossible
        self.syncs: list[dict[str, Tensor]] = []
        self.temperatures: list[float] = []
        self.fails_after: int | None = None
        self.bias = 0.0
        self.is_open = False

    def receive(self, pairs: Any) -> None:
        if not self.is_open:
            self.syncs.append({})
            self.is_open = True
        for name, tensor in pairs:
            if self.fails_after is not None and len(self.syncs[-1]) == self.fails_after:
                raise RuntimeError("engine out of memory")
            assert name not in self.syncs[-1], f"{name} was sent twice"
            self.syncs[-1][name] = tensor.detach().clone()
            with torch.no_grad():
                self.model.get_parameter(name).copy_(tensor)

    def close_sync(self) -> None:
        self.is_open = False

    @torch.no_grad()
    def answer(self, prompt: list[int], temperature: float, max_tokens: int) -> tuple[list[int], list[float]]:
        ids, log_probs = list(prompt), []
        for _ in range(max_tokens):
            logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1]
            distribution = (logits / (temperature or 1.0)).log_softmax(-1)
            token = distribution.argmax() if temperature == 0.0 else torch.multinomial(distribution.exp(), 1)
            ids.append(int(token))
            log_probs.append(float(distribution[int(token)]) + self.bias)
            if ids[-1] == EOS:
                break
        return ids[len(prompt) :], log_probs


class ColocatedLLM:
    """`vllm.LLM`, as far as TRL uses it."""

    engine: Engine

    def __init__(self, **options: Any) -> None:
        self.options = options
        model = SimpleNamespace(load_weights=self.engine.receive)
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=model))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=runner))

    def reset_prefix_cache(self) -> None:
        self.engine.close_sync()

    def generate(self, prompts: list[dict[str, Any]], sampling_params: Any, use_tqdm: bool) -> list[Any]:
        self.engine.temperatures.append(sampling_params.temperature)
        return [self._answer(prompt["prompt_token_ids"], sampling_params) for prompt in prompts]

    def _answer(self, prompt: list[int], options: Any) -> Any:
        ids, log_probs = self.engine.answer(prompt, options.temperature, options.max_tokens)
        entries = [{i: SimpleNamespace(logprob=p, rank=1)} for i, p in zip(ids, log_probs, strict=True)]
        return SimpleNamespace(prompt_token_ids=prompt, outputs=[SimpleNamespace(token_ids=ids, logprobs=entries)])


class ServerClient:
    """`trl.generation.vllm_client.VLLMClient` without a server; checks what is announced against what is sent."""

    engine: Engine

    def __init__(self, **options: Any) -> None:
        self.options = options

    def init_communicator(self, device: Any) -> None:
        pass

    def get_server_info(self) -> dict[str, Any]:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata: list[tuple[str, str, list[int]]], named_params: Iterator[Any]) -> None:
        self.engine.receive(named_params)
        sent = [(n, str(t.dtype).removeprefix("torch."), list(t.shape)) for n, t in self.engine.syncs[-1].items()]
        assert sent == metadata

    def reset_prefix_cache(self) -> None:
        self.engine.close_sync()

    def generate(self, prompts: list[list[int]], **options: Any) -> dict[str, Any]:
        self.engine.temperatures.append(options["temperature"])
        pairs = [
            self.engine.answer(prompt, options["temperature"], options["max_tokens"])
            for prompt in prompts
            for _ in range(options["n"])
        ]
        return {
            "prompt_ids": prompts,
            "completion_ids": [ids for ids, _ in pairs],
            "logprobs": [[[p] for p in log_probs] for _, log_probs in pairs],
        }


MakeVLLMTrainer = Callable[..., tuple[SVFPolicyGradientTrainer, Engine]]


@pytest.fixture
def make(make_trainer: MakeTrainer, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> MakeVLLMTrainer:
    """A trainer with `use_vllm=True` and the engine that it talks to."""

    def build(arguments: dict[str, Any] | None = None, **options: Any) -> tuple[SVFPolicyGradientTrainer, Engine]:
        arguments = {"model": tiny.model(), **(arguments or {})}
        engine = Engine(arguments["model"])
        monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
        monkeypatch.setattr(vllm_generation, "LLM", type("LLM", (ColocatedLLM,), {"engine": engine}), raising=False)
        monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
        client = type("VLLMClient", (ServerClient,), {"engine": engine})
        monkeypatch.setattr(vllm_generation, "VLLMClient", client)
        monkeypatch.setattr(vllm_generation, "ensure_master_addr_port", lambda: None)
        # TRL sets RANK and its like for vLLM, and they must not outlive the test.
        monkeypatch.setattr(vllm_generation, "os", SimpleNamespace(environ={}))
        options = {"per_device_train_batch_size": 4, "use_vllm": True, **options}
        return make_trainer(arguments, **options), engine

    return build


def bits(trainer: SVFPolicyGradientTrainer) -> dict[str, tuple[int, Tensor]]:
    frozen = {name: p for name, p in trainer.model.named_parameters() if not p.requires_grad}
    return {name: (p.data_ptr(), p.detach().clone()) for name, p in frozen.items()}


def assert_untouched(trainer: SVFPolicyGradientTrainer, before: dict[str, tuple[int, Tensor]]) -> None:
    assert not any(layer.merged for layer in trainer._adapter_layers)
    for name, (address, tensor) in bits(trainer).items():
        assert address == before[name][0] and torch.equal(tensor, before[name][1]), name


def merged_weights(trainer: SVFPolicyGradientTrainer) -> dict[str, Tensor]:
    """W' by PEFT's own way out: a copy of the model, merged and unloaded."""
    model = copy.deepcopy(trainer.model)
    model.get_base_model().__dict__.pop("forward", None)
    return {name: p.detach() for name, p in model.merge_and_unload().named_parameters()}


def rollout(trainer: SVFPolicyGradientTrainer) -> dict[str, Any]:
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._generate_and_score_completions([trainer.train_dataset[i] for i in range(4)])


def qwen_moe() -> PreTrainedModel:
    sizes: dict[str, Any] = {
        "vocab_size": 28,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 8,
    }
    experts: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, **heads, eos_token_id=2, pad_token_id=0))


FUSED = SVFConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
KINDS: dict[str, Callable[[SimpleNamespace], dict[str, Any]]] = {
    "Llama": lambda tiny: {"model": tiny.model()},
    "bfloat16": lambda tiny: {"model": tiny.model(torch.bfloat16)},
    "tied, with fused experts": lambda tiny: {"model": qwen_moe(), "peft_config": FUSED},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_engine_gets_the_merged_weights_under_the_names_of_the_base_model(
    make: MakeVLLMTrainer, tiny: SimpleNamespace, mode: str, kind: str
) -> None:
    trainer, engine = make(KINDS[kind](tiny), vllm_mode=mode)
    tiny.randomize_offsets(trainer.model)
    names = [name for name, _ in engine.model.named_parameters()]
    before, expected = bits(trainer), merged_weights(trainer)
    rollout(trainer)
    (sync,) = engine.syncs
    assert list(sync) == names
    assert all(torch.equal(sync[name], expected[name]) for name in names)
    base = dict(trainer.model.get_base_model().named_parameters())
    assert any(name not in base for name in names)  # adapted layers have other names here: the test means something
    assert_untouched(trainer, before)


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("fails_after", [0, 7])
def test_weights_are_put_back_when_the_engine_raises(
    make: MakeVLLMTrainer, tiny: SimpleNamespace, mode: str, fails_after: int
) -> None:
    trainer, engine = make(vllm_mode=mode)
    tiny.randomize_offsets(trainer.model)
    before = bits(trainer)
    engine.fails_after = fails_after
    with pytest.raises(RuntimeError, match="engine out of memory") as caught:
        rollout(trainer)
    assert_untouched(trainer, before)  # with the traceback, and so TRL's generator, still alive
    assert caught.value is not None
    engine.fails_after, engine.is_open = None, False
    rollout(trainer)  # the failed sync does not count as done
    assert all(torch.equal(engine.syncs[-1][n], w) for n, w in merged_weights(trainer).items())


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_every_step_answers_with_the_weights_of_that_step(make: MakeVLLMTrainer, mode: str) -> None:
    trainer, engine = make(max_steps=3, learning_rate=0.1, vllm_mode=mode, gradient_accumulation_steps=2)
    before = bits(trainer)
    expected: list[dict[str, Tensor]] = []
    generate = trainer.vllm_generation.generate

    def remember(*args: Any, **kwargs: Any) -> Any:
        expected.append(merged_weights(trainer))
        return generate(*args, **kwargs)

    trainer.vllm_generation.generate = remember
    trainer.train()
    assert len(engine.syncs) == len(expected) == 3
    for sync, weights in zip(engine.syncs, expected, strict=True):
        assert all(torch.equal(sync[name], weight) for name, weight in weights.items())
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(engine.syncs[0][name], engine.syncs[2][name])
    assert_untouched(trainer, before)


def test_offsets_that_change_within_a_step_are_sent_too(make: MakeVLLMTrainer, tiny: SimpleNamespace) -> None:
    """As at the end of training, when the best checkpoint is loaded: TRL would evaluate the last one."""
    trainer, engine = make()
    rollout(trainer)
    rollout(trainer)
    assert len(engine.syncs) == 1  # nothing changed
    tiny.randomize_offsets(trainer.model)
    rollout(trainer)
    assert len(engine.syncs) == 2
    assert all(torch.equal(engine.syncs[1][n], w) for n, w in merged_weights(trainer).items())


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_evaluation_is_greedy_and_repeatable(make: MakeVLLMTrainer, tiny: SimpleNamespace, mode: str) -> None:
    trainer, engine = make(vllm_mode=mode, temperature=0.7)
    tiny.randomize_offsets(trainer.model)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert set(engine.temperatures) == {0.0}
    assert first["eval_reward"] == second["eval_reward"]
    assert not [name for name in first if "sampling" in name]  # at another temperature, they mean nothing
    rollout(trainer)
    assert engine.temperatures[-1] == 0.7 and trainer.vllm_importance_sampling_correction


def test_answers_are_scored_as_the_engine_drew_them(make: MakeVLLMTrainer, tiny: SimpleNamespace) -> None:
    trainer, _ = make(temperature=0.7)
    tiny.randomize_offsets(trainer.model)
    batch = rollout(trainer)
    valid = batch["completion_mask"].bool()
    scored = trainer._score(trainer.model, batch, valid).log_probs
    torch.testing.assert_close(scored, batch["sampling_per_token_logps"][valid], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch["importance_sampling_ratio"], torch.ones(4, 1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["sequence_truncate", "token_truncate"])
def test_ratio_to_the_engine_weights_the_gradient(make: MakeVLLMTrainer, tiny: SimpleNamespace, mode: str) -> None:
    """An engine that thinks its answers e^0.1 times likelier a token: ρ = e^(−0.1 · tokens), or e^−0.1 a token."""
    trainer, engine = make(vllm_importance_sampling_mode=mode, max_completion_length=24)
    tiny.randomize_offsets(trainer.model)
    engine.bias = 0.1
    batch = rollout(trainer)
    batch["advantages"] = torch.tensor([1.0, -1.0, 0.5, 2.0])
    lengths = batch["completion_mask"].sum(1, keepdim=True)
    assert len(lengths.unique()) > 1, "answers of different length are needed"
    ratio = torch.exp(-0.1 * lengths) if mode.startswith("sequence") else torch.full_like(lengths, 1.0).mul(-0.1).exp()
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(trainer._compute_loss(trainer.model, batch), parameters)
    plain = {name: value for name, value in batch.items() if name != "importance_sampling_ratio"}
    plain["advantages"] = batch["advantages"] * ratio.squeeze(1)
    expected = torch.autograd.grad(trainer._compute_loss(trainer.model, plain), parameters)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_answers_far_from_the_policy_teach_nothing_by_default(make: MakeVLLMTrainer, tiny: SimpleNamespace) -> None:
    trainer, engine = make()  # sequence_mask with an upper bound of 3
    engine.bias = -2.0
    batch = rollout(trainer)
    assert batch["importance_sampling_ratio"].tolist() == [[0.0]] * 4
    gradient = torch.autograd.grad(
        trainer._compute_loss(trainer.model, batch), [p for p in trainer.model.parameters() if p.requires_grad]
    )
    assert all(part.abs().max() == 0 for part in gradient)


def test_steps_per_generation_are_left_to_vllm(make: MakeVLLMTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, engine = make(max_steps=1, gradient_accumulation_steps=4)
    monkeypatch.setattr(trainer, "_choose_steps", lambda: pytest.fail("vLLM manages its own memory"))
    trainer.train()
    assert len(engine.temperatures) == 1
    assert trainer.vllm_generation.llm.options["max_num_seqs"] == 16


@pytest.mark.parametrize("reason", ["FSDP", "quantized base model", "modules_to_save"])
def test_what_cannot_be_merged_is_refused_before_an_engine_starts(
    make: MakeVLLMTrainer, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    from peft import get_peft_model

    started: list[Any] = []
    arguments: dict[str, Any] = {"model": tiny.model()}
    if reason == "FSDP":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    elif reason == "quantized base model":
        arguments["model"].is_quantized = True
    else:
        config = SVFConfig(modules_to_save=["norm"])
        arguments = {"model": get_peft_model(tiny.model(), config, adapter_name="math"), "peft_config": None}
    monkeypatch.setattr(ColocatedLLM, "__init__", lambda self, **options: started.append(options))
    with pytest.raises(ValueError, match=rf"{reason}.*`use_vllm=False`"):
        make(arguments)
    assert not started


def test_a_quantized_checkpoint_is_refused_by_its_path(
    make_trainer: MakeTrainer, tiny: SimpleNamespace, tmp_path: Any
) -> None:
    model = tiny.model()
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path / "gptq")
    with pytest.raises(ValueError, match="quantized base model"):
        make_trainer({"model": str(tmp_path / "gptq")}, use_vllm=True)
