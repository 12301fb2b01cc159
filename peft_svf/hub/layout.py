"""Which files of a repository are ours: an expert's and a bank's, beside those that its owner put there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatch

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from peft_svf.experts.adapter_files import EXPERT_FILE
from peft_svf.experts.bank_config import BASE_FOLDER
from peft_svf.hub_cards.bank_facts import BANK_FILE
from peft_svf.hub_cards.card_files import CARD, CONFUSION, EVAL_RESULTS, LEARNING_CURVE, LEVERS


EXPERT, BANK = "an expert", "a bank"
ADAPTER = CONFIG_NAME
OF_CARD = (CARD, LEVERS, LEARNING_CURVE, CONFUSION, f"{EVAL_RESULTS}/*.yaml")
OF_EXPERT = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, EXPERT_FILE, *OF_CARD)
PICKLE = WEIGHTS_NAME  # of an older push by PEFT, beside which no safetensors file would be read
STUBS = ("modeling_transformer2.py", "transformer2.py")
PROCESSING = (  # what transformers writes for tokenizers and processors
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "additional_chat_templates/*.jinja",
)
OF_BANK = ("config.json", BANK_FILE, *STUBS, *PROCESSING)


def is_ours_of_expert(path: str) -> bool:
    """Whether a push of an expert writes, or has to replace, a file of this path."""
    return _is_one_of(path, (*OF_EXPERT, PICKLE))


def is_ours_of_bank(folders: Iterable[str]) -> Callable[[str], bool]:
    """The same of a bank with these folders, the base model's among them."""
    names = set(folders)

    def is_ours(path: str) -> bool:
        folder, _, rest = path.partition("/")
        if folder == BASE_FOLDER and folder in names:
            return True
        return _is_one_of(path, (*OF_BANK, *OF_EXPERT, PICKLE)) or (folder in names and is_ours_of_expert(rest))

    return is_ours


def _is_one_of(path: str, patterns: Iterable[str]) -> bool:
    return any(path.count("/") == pattern.count("/") and fnmatch(path, pattern) for pattern in patterns)
