"""SVFConfig: which weights to adapt, and the fingerprint of the base model that an expert belongs to."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig, PeftType


@dataclass
class SVFConfig(PeftConfig):
    """
    The configuration of singular value fine-tuning ([`SVFModel`]), from Transformer² (arXiv 2501.06252, section 3.1).

    Every adapted weight W = U Σ Vᵀ becomes W' = U Σ diag(1 + offset) Vᵀ at full rank, so there is no rank to choose:
    the only trained numbers are one offset for each singular value.

    Args:
        target_modules (`list[str]` or `str`, *optional*, defaults to `"all-linear"`):
            The names of the modules to adapt: names or name endings in a list, or a regular expression.
            `"all-linear"` and `None` mean all linear/Conv1D modules except the output layer (the best row of the
            paper's Table 4).
        exclude_modules (`list[str]` or `str`, *optional*):
            The names of modules not to adapt, in the same form.
        modules_to_save (`list[str]`, *optional*):
            Modules to train and save in full next to the offsets, for instance a new classification head.
        layers_to_transform (`list[int]` or `int`, *optional*):
            Adapt only the layers with these indices.
        layers_pattern (`list[str]` or `str`, *optional*):
            The name of the layer list that `layers_to_transform` refers to, if it is not a common one.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*):
            Tokens whose embeddings are trained too, selected by index.
        target_parameters (`list[str]`, *optional*):
            Reserved for fused expert parameters, which are not supported yet: must be left out.
        init_weights (`bool`, *optional*, defaults to `True`):
            `True` starts from offset 0, which is the base model exactly. `False` draws offsets with standard deviation
            0.1; it is meant for tests.
        base_fingerprint (`dict[str, list[float]]`, *optional*):
            A sketch of every adapted weight of the base model, by module name. Filled in when the adapter is created
            and compared when it is loaded; not for users to set.

    Raises:
        ValueError: `target_parameters` is given.
    """

    target_modules: list[str] | set[str] | str | None = field(
        default="all-linear",
        metadata={"help": "Modules to adapt: a list of names or endings, a regular expression, or 'all-linear'."},
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={"help": "Modules not to adapt: a list of names or endings, or a regular expression."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules to train and save in full next to the offsets."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={"help": "Indices of the layers to adapt; all layers if not given."},
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the layer list that `layers_to_transform` refers to."},
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={"help": "Indices of tokens whose embeddings are trained too."},
    )
    target_parameters: list[str] | None = field(
        default=None,
        metadata={"help": "Reserved for fused expert parameters, not supported yet."},
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "True: offset 0, the base model exactly. False: random offsets, for tests."},
    )
    base_fingerprint: dict[str, list[float]] | None = field(
        default=None,
        repr=False,
        metadata={"help": "Sketch of every adapted weight of the base model; filled in by the tuner."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SVF
        if self.target_modules is None:
            self.target_modules = "all-linear"
        # Sets, as in PEFT's own configurations: membership tests run once for every module of the model.
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` needs `layers_to_transform`: say which layer indices to adapt")
        if self.target_parameters:
            raise ValueError(
                f"`target_parameters={self.target_parameters}` is not supported yet: SVF adapts linear layers, not "
                "fused expert parameters; use `target_modules`"
            )
