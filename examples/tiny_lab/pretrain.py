"""Pre-train the playground's base model from scratch: `python pretrain.py --output base`. Deterministic from its seed.

For the study of transfer (examples/transfer_expert.py), `--seed`, `--hidden-size` and `--layers` make other bases, and
`--start-from` goes on training one that is there.

A Llama of 0.8 million parameters learns to answer chats of careful and careless authors; the loss counts answer tokens
only. Writes config, weights (safetensors) and tokenizer, about 3.5 MB, and prints the greedy accuracy of each family.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import Chat, make_chats
from tokenizer import CONTEXT_LENGTH, train_tokenizer
from torch import Tensor
from tqdm import tqdm, trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_svf.experts.files import make_readable, replaced_folder
from peft_svf.playground import generate_problems
from peft_svf.playground.families import MAKERS
from peft_svf.trainers.evaluation import greedy_answers


DEFAULT_STEPS = 3000
DEFAULT_SEED = 0
BATCH_SIZE = 96
MICRO_BATCH_SIZE = 48
LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.1
MAX_NEW_TOKENS = 48
HIDDEN_SIZE, LAYERS = 128, 4
FEED_FORWARD_RATIO = 2.75
IGNORED = -100  # label of tokens that are not part of an answer


def build_model(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int = HIDDEN_SIZE, layers: int = LAYERS
) -> LlamaForCausalLM:
    """A randomly initialised Llama with grouped-query attention and tied embeddings."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=int(FEED_FORWARD_RATIO * hidden_size),
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT_LENGTH,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def encode(tokenizer: PreTrainedTokenizerFast, chat: Chat) -> tuple[list[int], int]:
    """Token ids of a chat and the number of them that belong to the prompt."""
    prompt = tokenizer.apply_chat_template(chat.messages[:-1], add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompt)["input_ids"]
    answer_ids = [*tokenizer(chat.assistant)["input_ids"], tokenizer.eos_token_id]
    return prompt_ids + answer_ids, len(prompt_ids)


def micro_batches(tokenizer: PreTrainedTokenizerFast, chats: list[Chat]) -> list[tuple[Tensor, Tensor]]:
    """Right-padded (input ids, labels) pairs, rows of similar length together."""
    rows = sorted((encode(tokenizer, chat) for chat in chats), key=lambda row: len(row[0]))
    batches = []
    for start in range(0, len(rows), MICRO_BATCH_SIZE):
        part = rows[start : start + MICRO_BATCH_SIZE]
        length = len(part[-1][0])
        ids = torch.full((len(part), length), tokenizer.pad_token_id)
        labels = torch.full((len(part), length), IGNORED)
        for row, (tokens, n_prompt) in enumerate(part):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, n_prompt : len(tokens)] = torch.tensor(tokens[n_prompt:])
        batches.append((ids, labels))
    return batches


def answer_loss(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Summed next-token loss over answer tokens; logits are computed for those only."""
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]  # (rows, length - 1, hidden)
    targets = labels[:, 1:]
    counted = targets != IGNORED
    return F.cross_entropy(model.lm_head(hidden[counted]), targets[counted], reduction="sum")


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then cosine to zero."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (steps - WARMUP_STEPS)))


def share_of_careful_answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, n: int = 100
) -> dict[str, float]:
    """Share of validation prompts of each family that greedy decoding answers word for word as a careful author."""
    shares = {}
    for family in MAKERS:
        problems = generate_problems(family, "validation", n if family != "others" else 20)
        chats = [[{"role": "user", "content": problem.prompt}] for problem in problems]
        answers = greedy_answers(model, tokenizer, chats, MAX_NEW_TOKENS)
        shares[family] = sum(a == p.careful for a, p in zip(answers, problems, strict=True)) / len(problems)
    return shares


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write the model folder, replacing the last checkpoint in one step."""
    with replaced_folder(output.absolute()) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        make_readable(folder)


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    seed: int,
    every: int,
    checkpoint: Callable[[LlamaForCausalLM], None],
) -> LlamaForCausalLM:
    """Train for `steps` batches, calling `checkpoint` after each `every` of them and after the last."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    chats = make_chats(seed)
    bar = trange(steps, desc="pre-training", mininterval=2)
    for step in bar:
        batches = micro_batches(tokenizer, list(islice(chats, BATCH_SIZE)))
        n_tokens = sum(int((labels != IGNORED).sum()) for _, labels in batches)
        total = 0.0
        for ids, labels in batches:
            loss = answer_loss(model, ids, labels) / n_tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{total:.3f}", refresh=False)
        if (step + 1) % every == 0 or step + 1 == steps:
            checkpoint(model)
            model.train()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the model; replaced at each checkpoint")
    parser.add_argument(
        "--steps", type=int, default=DEFAULT_STEPS, help=f"batches of {BATCH_SIZE} chats (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=DEFAULT_SEED, help="seed of text and weights (default: %(default)s)"
    )
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=2, help="CPU threads; sums differ with it (default: %(default)s)"
    )
    parser.add_argument("--hidden-size", type=int, default=HIDDEN_SIZE, help="a multiple of 8 (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=LAYERS, help="(default: %(default)s)")
    parser.add_argument("--start-from", type=Path, help="folder of a model to go on training, instead of a new one")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    if arguments.start_from is None:
        tokenizer = train_tokenizer(arguments.seed)
        model = build_model(tokenizer, arguments.hidden_size, arguments.layers)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.start_from)
        model = LlamaForCausalLM.from_pretrained(arguments.start_from)
    started = time.time()

    def checkpoint(model: LlamaForCausalLM) -> None:
        save(model, tokenizer, arguments.output)
        shares = share_of_careful_answers(model, tokenizer)
        summary = ", ".join(f"{family} {share:.0%}" for family, share in shares.items())
        tqdm.write(f"{time.time() - started:.0f} s, greedy answers of a careful author: {summary}")

    pretrain(model, tokenizer, arguments.steps, arguments.seed, arguments.every, checkpoint)


if __name__ == "__main__":
    main()
