"""Oracle: transformers' own decision pipeline reads the same label probabilities, where labels are single tokens."""

from __future__ import annotations

import copy

import pytest
from transformers.decision import DecisionConfig
from transformers.pipelines.decision import DecisionPipeline

from peft_svf import ExpertBank, PromptDispatcher
from peft_svf.playground import BANK_FOLDER, generate_problems


def test_probabilities_are_those_of_the_decision_pipeline_and_playground_prompts_get_their_expert():
    bank = ExpertBank.from_pretrained(BANK_FOLDER)
    dispatcher = PromptDispatcher(bank)
    labels = [*bank.labels, "others"]
    tokenizer = copy.deepcopy(bank.tokenizer)  # the pipeline adds tokens to it
    template = tokenizer.chat_template.replace("in messages", "in [instruction, {'role': 'user', 'content': state}]")
    system = f"{{% set instruction = {{'role': 'system', 'content': {dispatcher.instruction!r}}} %}}"
    config = DecisionConfig(labels={"choice": labels}, chat_template=system + template)
    prompts = [problem.prompt for label in labels for problem in generate_problems(label, "test", 4)]
    question = {"type": "choice", "criteria": dict.fromkeys(labels)}
    requests = [{"state": prompt, "questions": {"expert": question}} for prompt in prompts]
    with bank.base_only() as model:
        decide = DecisionPipeline(model=model, tokenizer=tokenizer, decision_config=config)
        answers = [answer["expert"] for answer in decide(requests)]
    route = dispatcher.route(prompts)
    for scores, answer in zip(route.scores, answers, strict=True):
        assert scores == pytest.approx(answer["probabilities"], abs=1e-4)
    assert route.chosen() == [answer["choice"] for answer in answers]
    assert route.chosen() == [label for label in labels for _ in range(4)]
