"""The trainer's way to the Hub: the expert and its card in one commit, and nothing else of `output_dir`."""

from __future__ import annotations

import logging
import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, run_as_future
from peft import PeftModel
from peft.utils import CONFIG_NAME
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress

from peft_svf.experts.errors import ExpertError
from peft_svf.hub.base_reference import on_hub
from peft_svf.hub.layout import OF_EXPERT
from peft_svf.hub.staging import copy_files
from peft_svf.trainers.checkpoints.expert_cards import WritesExpertCards
from peft_svf.tuner import SVFConfig


logger = logging.getLogger(__name__)
_OF_THE_CARD = ("model_name", "dataset_name", "tags")


class PushesExperts(WritesExpertCards):
    """Mixin: uploads are those of [`~peft_svf.hub.push_expert`]; adapters that are not SVF keep transformers' way."""

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """
        Save the expert in `output_dir` and put it on the Hub, as [`~peft_svf.hub.push_expert`] does.

        Optimizer, logs, tokenizer and what else lies in `output_dir` stay here. `card_facts` may name the base model
        as others find it: `base_model`, `base_revision`. With several processes, call it on all of them.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`): Of the commit.
            blocking (`bool`, *optional*, defaults to `True`): Otherwise the upload goes on in the background.
            token, revision, private (*optional*):
                Hub token, branch, and whether a new repository is private. Default to `hub_token`, `hub_revision` and
                `hub_private_repo` of the configuration.
            kwargs:
                `tags` for the card, and `model_name` and `dataset_name`, its title and task.

        Returns:
            `CommitInfo`: The commit; a `Future` of it without `blocking`; `None` on all but the main process.

        Raises:
            HubError: The base model is not on the Hub, the Hub refused, or it cannot be reached.
        """
        if not self._is_svf:
            return super().push_to_hub(commit_message, blocking, token, revision, private, **kwargs)
        if strange := [name for name in kwargs if name not in _OF_THE_CARD]:
            raise TypeError(f"push_to_hub() takes no {strange[0]!r}: say it in `trainer.card_facts`.")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        tags = kwargs.get("tags") or ()
        options = {
            "commit_message": commit_message,
            "token": token,
            "branch": revision,
            "private": private,
            "tags": (tags,) if isinstance(tags, str) else tuple(tags),
            "facts": self._title(kwargs.get("model_name")) | _given(task=kwargs.get("dataset_name")),
        }
        if not blocking:
            return self._push_in_background(self.args.output_dir, options)
        return self.push_saved_expert(self.args.output_dir, **options).as_commit_info(commit_message or "")

    def push_saved_expert(self, folder: str | Path, **options: Any) -> Any:
        """
        Put an expert that this trainer has saved on the Hub, as it lies in `folder`; for the main process.

        Args:
            folder (`str` or `Path`): Where it was saved.
            options: Of [`~peft_svf.hub.push_expert`]; by default what the configuration says.

        Returns:
            [`~peft_svf.hub.Pushed`]: What it did.
        """
        from peft_svf.hub import push_expert

        args = self.args
        defaults = {
            "token": args.hub_token,
            "branch": args.hub_revision,
            "private": args.hub_private_repo,
            **{name: self.card_facts.get(name) for name in ("base_model", "base_revision")},
        }
        given = {name: value for name, value in options.items() if value is not None}
        return push_expert(self._root_of(Path(folder)), str(self.hub_model_id), **{**defaults, **given})

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the expert of a checkpoint in the background, with `hub_strategy="every_save"`."""
        if not self._is_svf:
            super()._push_from_checkpoint(checkpoint_folder)
            return
        if self._staging is not None or not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        running = getattr(self, "push_in_progress", None)  # from `init_hf_repo`
        if running is not None and not running.is_done() and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        by_steps = self.args.save_strategy == SaveStrategy.STEPS
        where = f"step {self.state.global_step}" if by_steps else f"epoch {int(self.state.epoch)}"
        options = {"commit_message": f"Training in progress, {where}", "facts": self._title(None)}
        job = self._push_in_background(checkpoint_folder, options)
        if running is None or running.is_done():
            jobs: Any = [job]  # what transformers' annotation, a single future, is not
            self.push_in_progress = PushInProgress(jobs)
        else:
            running.jobs.append(job)

    def _push_in_background(self, folder: str, options: dict[str, Any]) -> Future[CommitInfo]:
        """Push a copy, because training replaces and deletes checkpoints meanwhile."""
        copied = tempfile.TemporaryDirectory(prefix="peft-svf-")
        copy_files(self._root_of(Path(folder)), Path(copied.name), OF_EXPERT)

        def push() -> CommitInfo:
            try:
                pushed = self.push_saved_expert(copied.name, **options)
            except ExpertError as error:  # nobody may ever ask the future
                logger.warning(f"An upload in the background failed: {error}")
                raise
            finally:
                copied.cleanup()
            return pushed.as_commit_info(options["commit_message"] or "")

        return run_as_future(push)

    def _root_of(self, folder: Path) -> Path:
        """Where in `folder` the adapter is: PEFT saves one that is not called "default" in a folder of its name."""
        if (folder / CONFIG_NAME).is_file():
            return folder
        named = folder / str(self.accelerator.unwrap_model(self.model).active_adapter)
        return named if (named / CONFIG_NAME).is_file() else folder

    def _title(self, model_name: str | None) -> dict[str, Any]:
        """The card's title as transformers chooses it, unless `card_facts` says one."""
        hub_name = str(self.args.hub_model_id).split("/")[-1] if self.args.hub_model_id else None
        return _given(name=model_name or self.card_facts.get("name") or hub_name)


def check_can_push(args: Any, model: Any, peft_config: Any) -> None:
    """Raise a `ValueError` before a repository is created if what `push_to_hub=True` asks for cannot work."""
    is_adapted = isinstance(model, PeftModel)
    configs = [model.peft_config[name] for name in model.active_adapters] if is_adapted else [peft_config]
    if not args.push_to_hub or not all(isinstance(config, SVFConfig) for config in configs):
        return
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            f'`hub_strategy="{args.hub_strategy.value}"` would upload whole checkpoints, with optimizer and paths of '
            'this machine: use "every_save" for the expert of each checkpoint, or "end" for the last one.'
        )
    base = model.get_base_model() if is_adapted else model
    check_base_is_on_hub(
        base if isinstance(base, str) else getattr(base.config, "_name_or_path", None),
        "`push_to_hub=True`",
        "push the base model first (its push_to_hub) and load it from the Hub, or train without this and call "
        "peft_svf.hub.push_expert(output_dir, repo_id, base_model='user/base').",
    )


def check_base_is_on_hub(model: str | None, option: str, remedy: str) -> None:
    """Raise a `ValueError` if an expert's card could not say where its base model is."""
    if on_hub(model) is None:
        what = f"base model {model} is a folder, which" if model else "base model came from no checkpoint, so that"
        ending = "others do not have" if model else "others cannot load it"
        raise ValueError(f"{option}: the {what} {ending}; {remedy}")


def _given(**facts: Any) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value is not None}
