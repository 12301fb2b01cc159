"""Make an expert ready for an OpenAI-compatible server, and print the command that serves it.

peft-svf has no server of its own: `transformers serve` and vLLM are such servers, and an expert reaches them in one of
two forms.

    python serve_expert.py --output served-math                          # the playground's math expert, merged
    python serve_expert.py --model BANK --expert code --output served-code
    python serve_expert.py --model BASE --adapter svf-math --output lora-math --lora 64

`peft-svf export` does the same with more choices; this is how it is done in Python.

Merged: the expert is multiplied into the weights, exactly up to the rounding of their dtype. The result is an ordinary
checkpoint, costs what the base model costs, and needs no peft_svf where it is served:

    pip install "transformers[serving]"
    transformers serve served-math --host 127.0.0.1 --port 8000
    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" -d '{"model": "served-math",
        "messages": [{"role": "user", "content": "7 + 5 = ?"}], "temperature": 0, "max_tokens": 64}'

`model` in a request is the path that was given to the server (tests/examples/test_serve_expert.py asks such a server
and gets the pipeline's answer). `vllm serve served-math` serves the same folder.

LoRA: one server process, one copy of the base model, and every expert under a name of its own. vLLM serves it so:

    vllm serve BASE --enable-lora --max-lora-rank 64 --lora-modules math=lora-math code=lora-code

and a request says `"model": "math"`, or the base model's name. The LoRA is the best one of its rank, but an expert has
full rank: read the relative error that this script prints before you trust it, and merge if it is not small. vLLM's
`--max-lora-rank` takes 1, 8, 16, 32, 64, 128, 256, 320 or 512 only. (From vLLM's documentation and issues; it needs
a GPU and was not run in this project.) `transformers serve` does not load LoRA folders (transformers 5.23, tried).

A server does not route. To keep self-adaptation, ask a dispatcher which expert a prompt needs (`peft-svf route`, or
`PromptDispatcher(bank).route([prompt]).names()`) and put that name into `model`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_svf.experts import ExpertBank, ExpertError, save_as_lora
from peft_svf.experts.merged_export import check_empty, save_merged
from peft_svf.experts.serve_commands import lora_command, merged_commands
from peft_svf.playground import BANK_FOLDER


def main() -> None:
    arguments = parse()
    check_empty(arguments.output)
    bank, expert = load(arguments)
    if arguments.lora is None:
        save_merged(bank, arguments.output, expert)
        print(*merged_commands(arguments.output), sep="\n")
        return
    lora_error = save_as_lora(arguments.output, bank.model, arguments.lora, expert)
    print(f"# relative error of the LoRA: {lora_error.total:.2g} (0 is the expert, 1 the base model)")
    print(lora_command(arguments.output, expert))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make an expert ready for an OpenAI-compatible server.")
    parser.add_argument("--model", default=str(BANK_FOLDER), help="bank, or base model of --adapter (playground)")
    parser.add_argument("--expert", help="name of an expert of the bank (its first)")
    parser.add_argument("--adapter", help="an expert outside of a bank: a folder or an id on the Hub")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--lora", type=int, metavar="RANK", help="export a LoRA of this rank instead of merging")
    return parser.parse_args()


def load(arguments: argparse.Namespace) -> tuple[ExpertBank, str]:
    """A bank that has the expert, and the expert's name."""
    if arguments.adapter is None:
        bank = ExpertBank.from_pretrained(arguments.model)
        return bank, bank.check_expert(arguments.expert or next(iter(bank.experts)))
    name = arguments.expert or Path(arguments.adapter).name.replace(".", "-")
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    model = PeftModel.from_pretrained(base, arguments.adapter, adapter_name=name)
    return ExpertBank(model, AutoTokenizer.from_pretrained(arguments.model)), name


if __name__ == "__main__":
    try:
        main()
    except (ExpertError, ValueError) as error:
        raise SystemExit(str(error)) from None
