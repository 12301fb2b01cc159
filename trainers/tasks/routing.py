"""Routing: which label a prompt of another task has, asked as the dispatcher asks it (Transformer², section 3.2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

from datasets import Dataset

from peft_svf.dispatch.route import user_text
from peft_svf.dispatch.template import RoutingTemplate, default_instruction
from peft_svf.experts.bank import BASE_LABEL, ExpertEntry
from peft_svf.playground import generate_problems
from peft_svf.trainers.rewards.label import label_reward
from peft_svf.trainers.tasks.benchmark import question_id, user_prompt
from peft_svf.trainers.tasks.splits import check_batch_size, check_split, draw
from peft_svf.trainers.tasks.task import DataFiles, Task


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAPER_TASKS = ("gsm8k", "mbpp", "arc_challenge")
OTHERS_ROWS = {"train": 500, "validation": 50, "test": 50}  # there are few more distinct ones

Item = TypeVar("Item")


def routing_task(
    tasks: Sequence[str | Task] = PAPER_TASKS,
    *,
    instruction: str | None = None,
    descriptions: Mapping[str, str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Task:
    """
    The task that trains the classification expert (strategy B of Transformer², arXiv 2501.06252, section 3.2).

    The prompt is the dispatcher's: instruction and request, so that the expert is trained on the very text it is used
    on. Rows of every split come from the same split of the source tasks. The released code of the paper trains on the
    benchmarks' test rows; this does not. Every second request lacks the lines that a task begins or ends all its
    prompts with ("Then end with the line ..."): they would give the label away, and users do not write them.

    Args:
        tasks (`Sequence[str | Task]`, *optional*, defaults to GSM8K, MBPP and ARC-Challenge, as in the paper):
            Where the requests come from; their labels are to be told apart. `"playground-others"` has requests for no
            expert, with the label `"others"`.
        instruction (`str`, *optional*):
            The instruction of the dispatcher that the expert will serve: `PromptDispatcher(bank).instruction`. By
            default the one that is written for a bank with these labels and descriptions, in the order of `tasks`.
        descriptions (`Mapping[str, str]`, *optional*): Label to the bank's description of it, for that default.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer of the model that is trained. Needed where its chat template has no system role (the instruction
            then stands before the request) or where it has no chat template (the prompt then is plain text).

    Returns:
        [`Task`]: Named `"routing"`; its `load` is a [`RoutingLoader`].

    Raises:
        ValueError: If there are no tasks, or one of them twice.
    """
    names = [task.name if isinstance(task, Task) else task for task in tasks]
    if isinstance(tasks, str) or not names or len(set(names)) < len(names):
        raise ValueError(f"`tasks` must be a list of different tasks, not {tasks!r}")
    loader = RoutingLoader(tuple(tasks), instruction, dict(descriptions or {}), tokenizer)
    description = f"Which label a request has ({', '.join(names)}), asked as the dispatcher does; the label is judged."
    return Task("routing", "routing", loader, label_reward, max_new_tokens=16, description=description)


@dataclass(frozen=True)
class RoutingLoader:
    """Makes the rows of one split of the routing task; the arguments are those of [`routing_task`].

    Rows hold `id` (the source's), `prompt`, `answer` (the label), `labels` (all there are, `"others"` last) and `task`
    (the source's name). Labels take turns: every label has the same number of rows, or one more or less if `n` is no
    multiple of their number.
    """

    tasks: tuple[str | Task, ...]
    instruction: str | None
    descriptions: Mapping[str, str]
    tokenizer: PreTrainedTokenizerBase | None

    def __call__(
        self,
        split: str,
        n: int | None = None,
        seed: int = 0,
        *,
        data_files: Mapping[str, DataFiles] | Any = None,
        batch_size: int | None = None,
    ) -> Dataset:
        """
        Rows of one split.

        Args:
            split (`str`): `"train"`, `"validation"` or `"test"` of every source.
            n (`int`, *optional*):
                Rows in all; the first of them are those of a smaller `n`. As many as the rarest label allows if None.
            seed (`int`, *optional*, defaults to 0): Seed of the drawing.
            data_files (`Mapping[str, DataFiles]`, *optional*): Name of a source to the files that its task reads.
            batch_size (`int`, *optional*): Refuse a split (after `n`) with fewer rows than this.

        Raises:
            ValueError: If `n` is more than there is, if the sources have one label only, if the instruction does not
                name a label, or if a source cannot be read.
        """
        check_split("routing", split)
        sources = [_task(task) for task in self.tasks]
        labels, ask = self._labels(sources), self._asker(sources)
        files = _checked_files(data_files, sources)
        pools: dict[str, list[list[dict[str, Any]]]] = {}  # label: the rows of each of its sources
        for source in sources:
            rows = _load(source, split, files.get(source.name))
            rows = draw(source.name, split, rows, len(rows), seed)  # all of them, shuffled
            pools.setdefault(source.label, []).append(_rows(source, rows, ask))
        turns = {label: list(_in_turn(pool)) for label, pool in pools.items()}
        chosen = _balanced(split, turns, n)
        check_batch_size("routing", split, len(chosen), batch_size)
        return Dataset.from_list([{**row, "labels": labels} for row in chosen])

    def _labels(self, sources: Sequence[Task]) -> list[str]:
        labels = [label for label in dict.fromkeys(source.label for source in sources) if label != BASE_LABEL]
        if len({source.label for source in sources}) < 2:
            raise ValueError(
                f"all tasks have the label {sources[0].label!r}, so there is nothing to tell apart: add a task with "
                "another label, or give them labels with `dataclasses.replace(task, label=...)`"
            )
        return [*labels, BASE_LABEL]

    def _asker(self, sources: Sequence[Task]) -> _Asker:
        labels = self._labels(sources)
        if unknown := set(self.descriptions) - set(labels):
            raise ValueError(f"`descriptions` has {sorted(unknown)}, but the labels are {', '.join(labels)}")
        entries = [ExpertEntry(label, self.descriptions.get(label, "")) for label in labels[:-1]]
        instruction = self.instruction if self.instruction is not None else default_instruction(entries)
        if missing := [label for label in labels if label.casefold() not in instruction.casefold()]:
            raise ValueError(
                f"the instruction does not name {', '.join(missing)}: pass that of a dispatcher with the labels "
                f"{', '.join(labels)}, or other tasks. It is: {instruction!r}"
            )
        return _Asker(instruction, None if self.tokenizer is None else RoutingTemplate(self.tokenizer, instruction))


@dataclass(frozen=True)
class _Asker:
    """Turns a request into the dispatcher's question about it."""

    instruction: str
    template: RoutingTemplate | None

    def __call__(self, text: str) -> str | list[dict[str, str]]:
        if self.template is None:
            return [{"role": "system", "content": self.instruction}, *user_prompt(text)]
        return self.template.messages(text) if self.template.is_chat else self.template.render(text)


def _load(source: Task, split: str, files: DataFiles | None) -> Dataset:
    try:
        return source.load(split, data_files=files)
    except ConnectionError as error:
        raise ConnectionError(
            f"{error}\nThe task routing takes each source's files by its name: data_files={{'{source.name}': ...}}"
        ) from error


def _rows(source: Task, rows: Dataset, ask: _Asker) -> list[dict[str, Any]]:
    """Rows of the routing task, but for their `labels`, of a source's rows."""
    texts = [user_text(prompt) for prompt in rows["prompt"]]
    bare = _without_shared_lines(texts)
    return [
        {
            "id": name if name.startswith(f"{source.name}/") else f"{source.name}/{name}",
            "prompt": ask(bare[i] if i % 2 else texts[i]),
            "answer": source.label,
            "task": source.name,
        }
        for i, name in enumerate(map(str, rows["id"]))
    ]


def _without_shared_lines(texts: Sequence[str]) -> list[str]:
    """The texts without the first and the last lines that all of them have; a text of such lines alone is kept."""
    lines = [text.split("\n") for text in texts]
    first, last = _shared(lines), _shared([text[::-1] for text in lines])
    stripped = ["\n".join(text[first : len(text) - last]).strip() for text in lines]
    return [short or text for short, text in zip(stripped, texts, strict=True)]


def _shared(lines: Sequence[Sequence[str]]) -> int:
    """How many first lines all texts have in common."""
    return next((i for i, line in enumerate(zip(*lines, strict=False)) if len(set(line)) > 1), min(map(len, lines)))


def _in_turn(lists: Sequence[Sequence[Item]]) -> Iterator[Item]:
    """First items of all lists, then the second ones, and so on until every list is at its end."""
    gap = object()
    return (item for item in chain.from_iterable(zip_longest(*lists, fillvalue=gap)) if item is not gap)  # type: ignore[misc]


def _balanced(split: str, rows: Mapping[str, list[dict[str, Any]]], n: int | None) -> list[dict[str, Any]]:
    """`n` rows whose labels take turns."""
    each = min(map(len, rows.values()))
    if n is not None and not 1 <= n <= each * len(rows):
        sizes = ", ".join(f"{len(of_label)} {label}" for label, of_label in rows.items())
        raise ValueError(
            f"`n` is {n}, but the {split} split of routing has {each * len(rows)} rows, equally many of every label "
            f"(there are {sizes}): choose 1 to {each * len(rows)}"
        )
    return list(islice(_in_turn([of_label[:each] for of_label in rows.values()]), n))


def _checked_files(data_files: Any, sources: Sequence[Task]) -> Mapping[str, DataFiles]:
    if data_files is None:
        return {}
    names = [source.name for source in sources]
    if not isinstance(data_files, Mapping) or set(data_files) - set(names):
        given = list(data_files) if isinstance(data_files, Mapping) else data_files
        raise ValueError(
            f"`data_files` of routing must give each source its files, {{'{names[0]}': ...}}, with the names "
            f"{', '.join(names)}, not {given!r}"
        )
    return data_files


def _task(task: str | Task) -> Task:
    if isinstance(task, Task):
        return task
    if task == PLAYGROUND_OTHERS.name:
        return PLAYGROUND_OTHERS
    from peft_svf.trainers.tasks.registry import get_task  # which knows the task of this file, too

    return get_task(task)


def _load_others(
    split: str,
    n: int | None = None,
    seed: int = 0,
    *,
    data_files: DataFiles | None = None,
    batch_size: int | None = None,
) -> Dataset:
    """Requests of the playground that no expert is for."""
    if data_files is not None:
        raise ValueError("playground-others is generated, not read: remove its `data_files`")
    check_split("playground-others", split)
    problems = generate_problems(BASE_LABEL, split, OTHERS_ROWS[split] if n is None else n, seed)
    check_batch_size("playground-others", split, len(problems), batch_size)
    rows = [(question_id("playground-others", split, problem.prompt), problem.prompt) for problem in problems]
    return Dataset.from_list([{"id": name, "prompt": user_prompt(text), "answer": BASE_LABEL} for name, text in rows])


PLAYGROUND_OTHERS = Task("playground-others", BASE_LABEL, _load_others, label_reward, max_new_tokens=16)
"""A source of routing rows for "others", not a task to train an expert for."""

ROUTING = routing_task()
