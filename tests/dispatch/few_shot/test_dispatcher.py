"""FewShotDispatcher: search, route, an ordinary expert on disk, mistakes named early, and a split that is kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_svf import ExpertBank, SVFConfig
from peft_svf.cli import main
from peft_svf.dispatch.few_shot import (
    Adaptation,
    AdaptationExamplesError,
    FewShotDispatcher,
    MixtureSpace,
    SearchSettings,
    SearchStateError,
)
from peft_svf.dispatch.few_shot.examples import as_examples, prompt_hash, row_hashes
from peft_svf.dispatch.few_shot.population import Population
from peft_svf.playground import BANK_FOLDER
from peft_svf.trainers.evaluation import evaluate
from peft_svf.trainers.tasks import Task


EXPERTS = ("math", "code", "reasoning")
BASE = BANK_FOLDER / "base"
QUICK = SearchSettings(iterations=2, population=6, elite_ratio=0.4)


def one(experts: tuple[str, ...] = EXPERTS, **options: Any) -> list[MixtureSpace]:
    return [MixtureSpace(experts, **options)]


@pytest.fixture(scope="module")
def adapted(bank: ExpertBank, task: Task, examples: Dataset) -> FewShotDispatcher:
    """Free weights for each layer, which move every singular value."""
    space = one(groups=bank.layer_groups(), normalized=False)
    dispatcher = FewShotDispatcher(bank, examples, task=task, settings=QUICK, configurations=space)
    dispatcher.adapt(progress=False)
    return dispatcher


@pytest.fixture(scope="module")
def saved(adapted: FewShotDispatcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapted.save_pretrained(tmp_path_factory.mktemp("expert") / "new" / "mixture")


# -- search -----------------------------------------------------------------------------------------------------------
def test_every_prompt_gets_the_mixture_that_was_found(adapted: FewShotDispatcher, bank: ExpertBank) -> None:
    route = adapted.route(["one", [{"role": "user", "content": "two"}]])
    assert len(route) == 2 and torch.equal(route.weights[0], route.weights[1])
    assert route.groups == bank.layer_groups() and not route.residual
    assert list(adapted.weights) == list(bank.layer_groups())
    first = adapted.weights["model.layers.0"]
    assert list(first.values()) == route.weights[0, 0].tolist() and list(first) == list(EXPERTS)
    assert adapted.result.fitness == max(adapted.result.search.history[-1].fitness)


def test_references_are_the_scores_of_base_and_single_experts(
    adapted: FewShotDispatcher, bank: ExpertBank, task: Task, examples: Dataset
) -> None:
    found = {name: fitness.success for name, fitness in adapted.result.references.items()}
    with bank.base_only() as model:
        expected = {"others": evaluate(model, bank.tokenizer, task, examples).success}
    for name in EXPERTS:
        bank.model.set_adapter(name)
        expected[name] = evaluate(bank.model, bank.tokenizer, task, examples).success
    assert found == expected and len(set(found.values())) > 1


def odd(completions: list[Any], **kwargs: Any) -> list[float]:
    """Right or wrong like tossing a coin, but always the same of the same answer."""
    return [1.0 if sum(map(ord, completion[0]["content"])) % 2 else -1.0 for completion in completions]


def test_cross_validation_chooses_and_searches_are_seeded_and_resumed(
    bank: ExpertBank, examples: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaces = [*one(), *one(normalized=False)]
    calls = []
    outcomes = Population.outcomes
    monkeypatch.setattr(Population, "outcomes", lambda *args: calls.append(args) or outcomes(*args))

    def adapt(folder: Path | None, seed: int = 3, max_new_tokens: int = 2) -> Adaptation:
        calls.clear()
        settings = dataclasses.replace(QUICK, seed=seed, patience=0, collapse_tolerance=0.0)
        options: Any = {"settings": settings, "configurations": spaces, "folds": 2, "validation_iterations": 1}
        return FewShotDispatcher(bank, examples, odd, max_new_tokens, **options).adapt(folder, progress=False)

    result = adapt(tmp_path)
    assert len(calls) == 4 * (1 + 1) + 2 + 1  # searches and judging of two spaces in two folds; the search; references
    assert [score.space for score in result.cross_validation.scores] == spaces
    assert result.search.space == result.cross_validation.chosen
    assert "2-fold cross-validation on the examples alone" in result.statement
    assert "The paper picks its best configuration on test data" in result.statement
    resumed = adapt(tmp_path)
    assert len(calls) == 4 + 1  # no search runs again
    assert resumed.to_dict() == adapt(None).to_dict() == result.to_dict()
    assert adapt(None, seed=4).weights != result.weights
    with pytest.raises(SearchStateError, match="max_new_tokens"):
        adapt(tmp_path, max_new_tokens=3)


def test_a_reward_that_is_never_positive_is_told(bank: ExpertBank, examples: Dataset, tmp_path: Path) -> None:
    def never(completions: list[Any], **kwargs: Any) -> list[float]:
        return [-1.0] * len(completions)

    dispatcher = FewShotDispatcher(bank, examples, never, 2, settings=QUICK, configurations=one())
    with pytest.warns(UserWarning, match="No candidate answered any of the examples right"):
        result = dispatcher.adapt(progress=False)
    assert not result.adapted
    assert list(result.weights.values()) == pytest.approx([1 / 3] * 3)
    record = json.loads((dispatcher.save_pretrained(tmp_path / "mixture") / "adaptation.json").read_text())
    assert record["adapted"] is False and record["fitness"] == {"success": 0.0, "log_likelihood": None}


# -- an ordinary expert -----------------------------------------------------------------------------------------------
def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(BASE)
    return PeftModel.from_pretrained(base, str(folder)).eval()(input_ids=ids).logits


@torch.no_grad()
def test_the_saved_expert_computes_what_the_route_does(
    adapted: FewShotDispatcher, saved: Path, bank: ExpertBank
) -> None:
    before = bank.model.active_adapter, list(bank.model.peft_config), list(bank.model.state_dict())
    ids = torch.randint(5, 700, (3, 20), generator=torch.Generator().manual_seed(0))
    with bank.routed(adapted.route(["prompt"] * 3)):
        expected = bank.model(input_ids=ids).logits
    assert torch.equal(logits_of(saved, ids), expected)
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["peft_type"] == "SVF" and config["base_model_name_or_path"] == str(BASE)
    assert sorted(path.name for path in saved.iterdir()) == [
        "adaptation.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "expert.json",
    ]
    adapted.save_pretrained(saved)  # again, in place
    assert torch.equal(logits_of(saved, ids), expected)
    assert before == (bank.model.active_adapter, list(bank.model.peft_config), list(bank.model.state_dict()))


@torch.no_grad()
@pytest.mark.parametrize("space", [{}, {"normalized": False, "residual": True}])
def test_normalized_and_residual_mixtures_are_saved_as_they_are(
    bank: ExpertBank, examples: Dataset, task: Task, tmp_path: Path, space: dict[str, bool]
) -> None:
    settings = dataclasses.replace(QUICK, iterations=1)
    found = FewShotDispatcher(bank, examples, task.reward, 1, settings=settings, configurations=one(**space))
    with pytest.warns(UserWarning, match="No candidate"):
        found.adapt(progress=False)
    ids = torch.arange(5, 45)[None]
    with bank.routed(found.route(["prompt"])):
        expected = bank.model(input_ids=ids).logits
    assert torch.equal(logits_of(found.save_pretrained(tmp_path / "mixture"), ids), expected)


@torch.no_grad()
def test_experts_of_limited_rank_are_never_scaled_as_a_whole(examples: Dataset, task: Task, tmp_path: Path) -> None:
    ranks = {"one": 4, "two": 6}
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(BASE)
    for name, rank in ranks.items():
        config = SVFConfig(rank=rank, init_weights=False)
        model = get_peft_model(model, config, name) if name == "one" else model.add_adapter(name, config) or model
    bank = ExpertBank(model, AutoTokenizer.from_pretrained(BASE))
    with pytest.raises(ValueError, match=r"'global-free' is not for these experts: .* only the leading 6 are adapted"):
        FewShotDispatcher(bank, examples, task=task, configurations=one(tuple(ranks), normalized=False))
    options: Any = {"settings": dataclasses.replace(QUICK, iterations=1), "folds": 2, "validation_iterations": 1}
    dispatcher = FewShotDispatcher(bank, examples, odd, 1, **options)
    assert [space.name for space in dispatcher.configurations] == [
        "global-normalized",
        "global-free-residual",
        "grouped-normalized",
        "grouped-free-residual",
    ]
    dispatcher.adapt(progress=False)
    ids = torch.arange(5, 45)[None]
    with bank.routed(dispatcher.route(["prompt"])):
        expected = model(input_ids=ids).logits
    assert torch.equal(logits_of(dispatcher.save_pretrained(tmp_path / "mixture"), ids), expected)


def test_configurations_of_one_name_are_kept_apart(bank: ExpertBank, examples: Dataset, tmp_path: Path) -> None:
    spaces = [*one(groups=bank.layer_groups()), *one(groups=bank.matrix_groups())]
    options: Any = {"settings": dataclasses.replace(QUICK, iterations=1), "folds": 2}
    FewShotDispatcher(bank, examples, odd, 1, configurations=spaces, **options).adapt(tmp_path, progress=False)
    folders = {path.name for path in tmp_path.iterdir()}
    assert {f"grouped-normalized{own}-fold-{fold}" for own in ("", "-2") for fold in (0, 1)} < folders


def test_what_was_found_is_written_down(adapted: FewShotDispatcher, saved: Path, examples: Dataset) -> None:
    record = json.loads((saved / "adaptation.json").read_text())
    assert record["weights"] == adapted.weights
    assert record["configuration"] == "grouped-free" and "was given, not chosen" in record["statement"]
    assert record["cross_validation"] is None and len(record["generations"]) == 2
    assert record["fitness"]["success"] == adapted.result.fitness.success
    assert set(record["references"]) == {"others", *EXPERTS}
    assert record["settings"]["seed"] == 0 and record["settings"]["population"] == 6
    assert record["example_hashes"] == sorted(row_hashes(examples)) and record["examples"] == 4


def test_nothing_else_is_replaced(adapted: FewShotDispatcher, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is no expert of a few-shot search; choose a new folder"):
        adapted.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


# -- the split --------------------------------------------------------------------------------------------------------
def test_adaptation_examples_are_not_evaluated_on(
    adapted: FewShotDispatcher, bank: ExpertBank, task: Task, examples: Dataset
) -> None:
    other = task.load("test", 3)
    found = evaluate(bank, bank.tokenizer, task, other, dispatcher=adapted)
    assert found.experts == ["mixture"] * 3
    texts = [{"prompt": row["prompt"][0]["content"] + " \n", "answer": row["answer"]} for row in examples]
    mixed = Dataset.from_list([{"prompt": "Another?", "answer": "A"}, *texts[1:3]])
    with pytest.raises(AdaptationExamplesError, match=r"adapted on 2 of the 3 rows to be evaluated \(1, 2\)"):
        evaluate(bank, bank.tokenizer, task, mixed, dispatcher=adapted)


def test_the_command_refuses_them_for_the_saved_expert(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "--model", str(BASE), "--task", "playground-reasoning", "--use-cpu", "-n", "4"]
    assert main([*words, "--split", "train", "--adapter", str(saved)]) == 1
    error = capsys.readouterr().err
    assert f"peft-svf evaluate: {saved} was adapted on 4 of the 4 rows" in error and "Traceback" not in error
    assert main([*words, "--adapter", str(saved)]) == 0
    assert "mixture" in capsys.readouterr().out
    (saved / "adaptation.json").write_text("{}")
    assert main([*words, "--adapter", str(saved)]) == 1
    assert "does not say which examples" in capsys.readouterr().err


def test_one_question_has_one_hash_however_it_is_written() -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Caf\u00e9\n or  tea?"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Café or tea?"}]}]
    assert prompt_hash(chat) == prompt_hash("Cafe\u0301 or tea?\n") == prompt_hash(parts)
    assert prompt_hash(chat) != prompt_hash("Café or Tea?")
    red, blue = (Image.new("RGB", (2, 2), color) for color in ("red", "blue"))
    assert len({prompt_hash("What?", image) for image in (None, red, blue)} | {prompt_hash("What?", [red])}) == 3


# -- mistakes ---------------------------------------------------------------------------------------------------------
def needs_answer(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no examples"),
        ([{"answer": "1"}], "lack the column 'prompt'"),
        ([{"prompt": "What?"}], "lack the column 'answer' that needs_answer needs"),
        ([{"prompt": "What?", "answer": "1"}, {"prompt": "Who?"}], "Example 1 lacks 'answer'"),
        ([{"prompt": " ", "answer": "1"}], "prompt of example 0 is empty"),
        ([{"prompt": "What?", "answer": "1"}, {"prompt": "What? ", "answer": "2"}], "examples 0 and 1 have the same"),
        (["What?"], "Example 0 is a dict"),
        ("What?", "list of dicts, not str"),
    ],
)
def test_unusable_examples_are_named(rows: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        as_examples(rows, needs_answer)


@pytest.mark.parametrize("argument", ["bank", "task", "settings"])
def test_names_in_place_of_objects_are_refused(bank: ExpertBank, task: Task, examples: Dataset, argument: str) -> None:
    arguments: dict[str, Any] = {"bank": bank, "examples": examples, "task": task, argument: "a name"}
    with pytest.raises(TypeError, match=f"`{argument}` is an? .*, not 'a name'; "):
        FewShotDispatcher(**arguments)


def test_unusable_arguments_are_named(bank: ExpertBank, task: Task, examples: Dataset) -> None:
    lonely = ExpertBank(bank.model, bank.tokenizer, {"math": bank.experts["math"]})
    empty = ExpertBank(bank.base_model, bank.tokenizer, {})
    crowded = SearchSettings(population=3, elite_ratio=0.7, include_experts=True)
    for its_bank, options, message in (
        (lonely, {"task": task}, "at least two experts, but the bank has only 'math'"),
        (empty, {"task": task}, "at least two experts, but the bank has none"),
        (bank, {"reward": task.reward}, "pass both, or a `task`"),
        (bank, {"task": task, "max_new_tokens": 0}, "`max_new_tokens` is at least 1"),
        (bank, {"task": task, "configurations": []}, "`configurations` is empty"),
        (bank, {"task": task, "configurations": one(("math", "poetry"))}, "Unknown expert 'poetry'"),
        (bank, {"task": task, "validation_iterations": 0}, "iterations must be a whole number"),
        (bank, {"task": task, "folds": 1}, "at least 2 examples and 2 folds, got 4 and 1"),
        (bank, {"task": task, "settings": crowded}, "has no room for 3 single experts"),
    ):
        with pytest.raises(ValueError, match=message):
            FewShotDispatcher(its_bank, examples, **options)
    with pytest.raises(ValueError, match="with a single example choose the configuration yourself"):
        FewShotDispatcher(bank, examples.select([0]), task=task)
    dispatcher = FewShotDispatcher(bank, examples, task=task)
    for use in (lambda: dispatcher.route(["a"]), lambda: dispatcher.save_pretrained("x"), lambda: dispatcher.weights):
        with pytest.raises(RuntimeError, match=r"call `adapt\(\)` first"):
            use()


def test_a_single_prompt_is_not_routed_letter_by_letter(adapted: FewShotDispatcher) -> None:
    with pytest.raises(TypeError, match=r"pass \[prompt\]"):
        adapted.route("What?")
