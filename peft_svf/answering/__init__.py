"""Answers of a model to prompts, and what a reward makes of them: what evaluation and few-shot adaptation share."""

from peft_svf.answering.generator import AnswerGenerator, Processor, RowWeights, ScoredAnswer
from peft_svf.answering.judging import REASON_COLUMN, judge_answers
from peft_svf.answering.messages import IMAGE_COLUMNS, Messages, Prompt, answer_text, image_column, plain_prompt
from peft_svf.answering.processes import Processes


__all__ = [
    "IMAGE_COLUMNS",
    "REASON_COLUMN",
    "AnswerGenerator",
    "Messages",
    "Processes",
    "Processor",
    "Prompt",
    "RowWeights",
    "ScoredAnswer",
    "answer_text",
    "image_column",
    "judge_answers",
    "plain_prompt",
]
