"""Expert: the trained offsets of one expert, its facts and the fingerprint of its base, without the base model."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from peft_svf.experts.adapter_files import EXPERT_FILE, OFFSET_ENDING, read_adapter, read_facts
from peft_svf.experts.bank_config import BASE_FOLDER
from peft_svf.experts.bank_loading import expert_folder, load_expert, names_hub_model
from peft_svf.experts.errors import ExpertError
from peft_svf.experts.files import make_readable, replaced_folder
from peft_svf.experts.live_facts import facts_of
from peft_svf.tuner.config import SVFConfig
from peft_svf.tuner.layer import SVFLayer
from peft_svf.tuner.names import PEFT_PREFIX, name_in_base


if TYPE_CHECKING:
    from peft_svf.hub.destination import Pushed

_SAVED_BASIS = ".svf_saved_basis."
_CARD = {"README.md", ".eval_results", "levers.png", "moved_components.png", "learning_curve.png"}
_FILES = {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, EXPERT_FILE, *_CARD}


@dataclass(frozen=True, eq=False)  # tensors have no one truth of being equal
class Expert:
    """
    One expert: W' = U Σ diag(z) Vᵀ for each adapted weight (Transformer², arXiv 2501.06252, section 3.1), as numbers.

    It needs no base model: experts can be compared, mixed ([`peft_svf.experts.algebra`]), saved and shared without
    one. A module that an expert does not adapt has offset 0, as in the base model.

    Args:
        offsets (`Mapping[str, torch.Tensor]`):
            z − 1 by module name in the base model, shape (k,) for the k leading singular values, in descending order
            of these; (experts, k) for fused parameters. float32 on the CPU.
        config ([`SVFConfig`]): What is adapted, the base model, and its fingerprint; parametrization "offset".
        metadata (`Mapping[str, Any]`, *optional*):
            What is known of the expert, of JSON types: name, label, description, task, results and so on, the facts
            of its card ([`~peft_svf.hub_cards.ExpertCardData`]). Saved as `expert.json`.
        others (`Mapping[str, torch.Tensor]`, *optional*):
            What its checkpoint holds besides offsets: `modules_to_save`, trained tokens, saved bases.
        source (`str`, *optional*): Where it comes from, for messages.
    """

    offsets: Mapping[str, torch.Tensor]
    config: SVFConfig
    metadata: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, torch.Tensor] = field(default_factory=dict)
    source: str = "the expert"

    def __repr__(self) -> str:
        count = sum(offset.numel() for offset in self.offsets.values())
        return f"Expert({self.source!r}: {count:,} offsets of {len(self.offsets)} modules of {self.base_model!r})"

    @property
    def z(self) -> dict[str, torch.Tensor]:
        """The scales of the singular values, 1 + offset, by module name."""
        return {name: 1 + offset for name, offset in self.offsets.items()}

    @property
    def fingerprint(self) -> dict[str, list[float]]:
        """Sketches of the base model's adapted weights, by module name ([`peft_svf.spectrum.weight_sketch`])."""
        return self.config.base_fingerprint or {}

    @property
    def fingerprint_id(self) -> str | None:
        """Twelve characters that stand for the fingerprint, for people; `None` without one."""
        if not self.fingerprint:
            return None
        rounded = {name: [f"{value:.5e}" for value in sketch] for name, sketch in self.fingerprint.items()}
        return hashlib.sha256(json.dumps(rounded, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def base_model(self) -> str | None:
        """Hub id or folder of the base model."""
        return self.config.base_model_name_or_path

    @property
    def base_revision(self) -> str | None:
        """Commit of a base model on the Hub."""
        return self.config.revision

    @classmethod
    def from_pretrained(
        cls,
        folder_or_id: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        subfolder: str | None = None,
    ) -> Expert:
        """
        Load an expert; nothing of its base model is needed.

        Args:
            folder_or_id (`str` or `Path`): The folder of an SVF adapter, or a Hub id.
            revision (`str`, *optional*): Branch, tag or commit, for a Hub id.
            token (`str`, *optional*): Hub token.
            subfolder (`str`, *optional*): Where it lies in there, like the name of an expert of a bank.

        Raises:
            ExpertError: There is no such expert, it is damaged or not SVF, or trained in the parametrization
                "sigmoid", in which z depends on the base model too: load it with the model, then `Expert.from_model`.
        """
        folder = expert_folder(folder_or_id, revision, token, subfolder)
        where = f"the expert {folder_or_id}" + (f"/{subfolder}" if subfolder else "")
        config, offsets, others = read_adapter(folder, where)
        if config.parametrization != "offset":
            raise ExpertError(
                f"{where} holds logits (parametrization '{config.parametrization}'), which become z only with the "
                "singular values of its base model: load it with PeftModel.from_pretrained, then Expert.from_model."
            )
        if config.base_model_name_or_path == BASE_FOLDER and (base := folder.parent / BASE_FOLDER).is_dir():
            config.base_model_name_or_path = str(base.absolute())  # within the folder of a bank it is called that
        elif not Path(folder_or_id).is_dir() and not names_hub_model(config.base_model_name_or_path):
            config.base_model_name_or_path = None  # a folder of the bank, or of somebody's computer
        return cls(offsets, config, read_facts(folder, where), others, where)

    @classmethod
    def from_model(
        cls, model: nn.Module, adapter_name: str = "default", metadata: Mapping[str, Any] | None = None
    ) -> Expert:
        """
        The expert of a live model, at the strength it has there, in either parametrization.

        Args:
            model (`nn.Module`): A model with SVF adapters.
            adapter_name (`str`, *optional*, defaults to `"default"`): The adapter.
            metadata (`Mapping[str, Any]`, *optional*):
                See [`Expert`]. Defaults to what the model knows of the expert: from training it, or from the
                `expert.json` that it was loaded with; nothing if its offsets were changed after that.

        Raises:
            ExpertError: There is no SVF adapter of this name, or its values are not finite.
        """
        model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
        live = getattr(model, "peft_config", {}).get(adapter_name)
        offsets = {}
        for name, module in model.named_modules():
            if isinstance(module, SVFLayer) and adapter_name in module.svf_offset:
                offset = module.offset(adapter_name).detach().to("cpu", torch.float32, copy=True)
                if not torch.isfinite(offset).all():
                    raise ExpertError(f"The offsets of '{name_in_base(name)}' are not finite; train the expert again.")
                offsets[name_in_base(name)] = offset
        if not offsets or not isinstance(live, SVFConfig):
            raise ExpertError(f"The model has no SVF adapter '{adapter_name}'; it has {adapters_of(model)}.")
        state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        others = {
            PEFT_PREFIX + key.removeprefix(PEFT_PREFIX): value.detach().cpu().clone()
            for key, value in state.items()
            if not key.endswith(OFFSET_ENDING)
        }
        config = copy.deepcopy(live)
        config.parametrization = "offset"
        config.inference_mode = True
        facts = facts_of(model, adapter_name) if metadata is None else dict(metadata)
        return cls(offsets, config, facts, others, f"the adapter '{adapter_name}'")

    def with_offsets(self, offsets: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None = None) -> Expert:
        """
        This expert with other offsets on the same base model; its configuration follows their modules and lengths.

        Args:
            offsets (`Mapping[str, torch.Tensor]`): As in [`Expert`]; float32 is made of them.
            metadata (`Mapping[str, Any]`, *optional*): In place of this expert's.

        Raises:
            ExpertError: There are none, they are not finite, or the expert adapts fused parameters and these are not
                of the same modules and shapes: a configuration tells fused parameters apart by the model only.
        """
        config, others = copy.deepcopy(self.config), dict(self.others)
        made = {name: offset.detach().to("cpu", torch.float32) for name, offset in offsets.items()}
        if broken := [name for name, offset in made.items() if not torch.isfinite(offset).all()]:
            raise ExpertError(f"The new offsets of '{broken[0]}' are not finite.")
        if not made:
            raise ExpertError("An expert needs offsets of at least one module.")
        if {name: o.shape for name, o in made.items()} != {name: o.shape for name, o in self.offsets.items()}:
            if config.target_parameters:
                raise ExpertError(
                    f"{self.source} adapts fused parameters ({', '.join(config.target_parameters)}), so other modules "
                    "or numbers of components than its own cannot be described without the model."
                )
            _describe(made, config)
        if config.save_basis and not _bases_suffice(made, others):
            config.save_basis = False  # they are then computed from the base model when the expert is loaded
            others = {key: tensor for key, tensor in others.items() if _SAVED_BASIS not in key}
        facts = dict(self.metadata if metadata is None else metadata)
        return replace(self, offsets=made, config=config, metadata=facts, others=others)

    def put_into(self, model: nn.Module, adapter_name: str) -> PeftModel:
        """
        Add the expert to its live base model, checked against the fingerprint; on an error the model is as it was.

        Args:
            model (`PreTrainedModel` or `PeftModel`): Changed in place.
            adapter_name (`str`): What the expert is called in the model.

        Returns:
            `PeftModel`: The model with the adapter; `model` itself if it was one already.

        Raises:
            ExpertError: The expert belongs to another base model, or the name is taken.
        """
        if adapter_name in getattr(model, "peft_config", {}):
            raise ExpertError(f"The model has an adapter '{adapter_name}' already; choose another name.")
        with tempfile.TemporaryDirectory(prefix="peft-svf-") as folder:
            target = self.save_pretrained(Path(folder) / adapter_name)
            return load_expert(model, target, adapter_name, self.source)

    def save_pretrained(self, folder: str | Path) -> Path:
        """
        Write the expert as an adapter that PEFT loads, as a whole or not at all; an expert that is there is replaced.

        It has no card: [`~peft_svf.hub_cards.write_expert_card`] makes one of the metadata.

        Raises:
            ExpertError: The folder holds something else.
        """
        target = Path(folder).absolute()
        check_replaceable(target)
        tensors = {f"{PEFT_PREFIX}{name}{OFFSET_ENDING}": offset for name, offset in self.offsets.items()}
        tensors |= dict(self.others)
        with replaced_folder(target) as staging:
            config = copy.deepcopy(self.config)
            config.inference_mode = True
            for name in ("target_modules", "exclude_modules"):  # sets, in another order in every process
                if isinstance(names := getattr(config, name), set):
                    setattr(config, name, sorted(names))
            config.save_pretrained(str(staging))
            save_file(
                {key: t.contiguous() for key, t in tensors.items()},
                staging / SAFETENSORS_WEIGHTS_NAME,
                {"format": "pt"},
            )
            if self.metadata:
                write_facts(staging, self.metadata)
            make_readable(staging)
        return target

    def push_to_hub(self, repo_id: str, **options: Any) -> Pushed:
        """Put the expert on the Hub, with its card; `options` and errors as of [`~peft_svf.hub.push_expert`]."""
        from peft_svf.hub import push_expert

        return push_expert(self, repo_id, **options)

    def check_only_offsets(self, purpose: str) -> None:
        """Raise an `ExpertError` if the expert has trained more than offsets, which `purpose` would lose."""
        extra = [key for key in self.others if _SAVED_BASIS not in key]
        if extra:
            raise ExpertError(
                f"{self.source} has trained more than offsets ({', '.join(extra[:3])}), and {purpose} works on "
                "offsets only; train experts without modules_to_save and trainable_token_indices."
            )


def check_replaceable(folder: Path) -> None:
    """Raise an `ExpertError` if an expert saved to `folder` would replace something that is none."""
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or not found <= _FILES:
        strange = ", ".join(sorted(found - _FILES)[:3]) or "a file"
        raise ExpertError(f"{folder} holds {strange}, not only an expert; choose a new folder.")


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write `expert.json` into an existing folder; raises an `ExpertError` for what JSON cannot say."""
    try:
        text = json.dumps(dict(facts), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ExpertError(f"The facts of an expert must be JSON, without NaN and infinity ({error}).") from error
    (folder / EXPERT_FILE).write_text(text, "utf-8")


def adapters_of(model: nn.Module) -> str:
    """The adapters of a model, for messages: "'math', 'code'" or "none"."""
    return ", ".join(f"'{name}'" for name in getattr(model, "peft_config", {})) or "none"


def leading_ranks(offsets: Mapping[str, torch.Tensor], full: Mapping[str, int]) -> dict[str, int]:
    """The `rank_pattern` of those offsets that are fewer than their weight has singular values, as far as known."""
    return {  # "^": PEFT takes patterns for endings, and one module's name may end with another's
        f"^{re.escape(name)}": offset.shape[-1]
        for name, offset in offsets.items()
        if offset.shape[-1] != full.get(name)
    }


def _describe(offsets: Mapping[str, torch.Tensor], config: SVFConfig) -> None:
    """Let `config` say which modules are adapted, and of which of them only the leading components."""
    fingerprint = config.base_fingerprint or {}
    full = {name: int(min(sketch[:2])) for name, sketch in fingerprint.items()}
    config.target_modules = set(offsets)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = config.rank = None
    config.rank_pattern = leading_ranks(offsets, full)
    config.base_fingerprint = {name: fingerprint[name] for name in offsets if name in fingerprint}


def _bases_suffice(offsets: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> bool:
    """Whether the bases that are saved with an expert have a column for each of its offsets."""
    bases = {name: others.get(f"{PEFT_PREFIX}{name}{_SAVED_BASIS}vectors") for name in offsets}
    return all(basis is not None and basis.shape[-1] >= offsets[name].shape[-1] for name, basis in bases.items())
