"""SVFConfig: which weights to adapt, and the fingerprint of the base model that an expert belongs to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig, PeftType


@dataclass
class SVFConfig(PeftConfig):
    """
    The configuration of singular value fine-tuning ([`SVFModel`]), from Transformer² (arXiv 2501.06252, section 3.1).

    Every adapted weight W = U Σ Vᵀ becomes W' = U Σ diag(1 + offset) Vᵀ. The only trained numbers are one offset for
    each singular value, at full rank unless `rank` says otherwise. Half of the layers, as the paper adapts its largest
    models: `SVFConfig(layers_to_transform=list(range(0, model.config.num_hidden_layers, 2)))`.

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
            Parameters to adapt that are not the weight of a linear layer: the fused experts of a mixture-of-experts
            model, for instance `["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]`. Every expert has its own
            singular values. They come on top of `target_modules`; with `target_modules=None`, only they are adapted.
        rank (`int`, *optional*):
            Adapt only this many leading singular values of every weight; all of them if not given. Weights with fewer
            are adapted in full.
        rank_pattern (`dict[str, int]`, *optional*):
            Exceptions from `rank`, by module name or regular expression: `{"layers.0.self_attn.q_proj": 8}`.
        parametrization (`"offset"` or `"sigmoid"`, *optional*, defaults to `"offset"`):
            What is trained. `"offset"`: z − 1 itself, starting at 0. `"sigmoid"`: the logit p of z = sigmoid(p), with
            W' rescaled so that its nuclear norm stays that of W (see [`SVFConfig.paper`]).
        init_weights (`bool`, *optional*, defaults to `True`):
            `True` starts from offset 0, which is the base model exactly (with `"sigmoid"`, close to it: logits with
            mean 0.1 and standard deviation 0.01). `False` draws offsets with a standard deviation of about 0.1; it is
            meant for tests.
        basis_source (`str`, *optional*):
            Folder or Hub id of the unquantized checkpoint of the base model. The singular bases are then computed from
            its weights, read tensor by tensor, instead of from those of the model: for bases that are quantized to
            few bits, or in a format that cannot be dequantized.
        save_basis (`bool`, *optional*, defaults to `False`):
            Save the singular bases with the expert. It is then no longer small, but loads without computing anything,
            also onto formats that cannot be dequantized.
        base_fingerprint (`dict[str, list[float]]`, *optional*):
            A sketch of every adapted weight of the base model, by module name. Filled in when the adapter is created
            and compared when it is loaded; not for users to set.

    Raises:
        ValueError: A value that cannot be; the message names the argument.
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
        metadata={"help": "Fused expert parameters to adapt, by name or ending."},
    )
    rank: int | None = field(
        default=None,
        metadata={"help": "Number of leading singular values to adapt; all if not given."},
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Exceptions from `rank`, by module name or regular expression."},
    )
    parametrization: Literal["offset", "sigmoid"] = field(
        default="offset",
        metadata={"help": "What is trained: the offset z - 1, or the logit of z as in the paper's code."},
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "True: offset 0, the base model exactly. False: random offsets, for tests."},
    )
    basis_source: str | None = field(
        default=None,
        metadata={"help": "Unquantized checkpoint of the base model, to take the singular bases from."},
    )
    save_basis: bool = field(
        default=False,
        metadata={"help": "Save the singular bases with the expert."},
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
            self.target_modules = set() if self.target_parameters else "all-linear"
        # Sets, as in PEFT's own configurations: membership tests run once for every module of the model.
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` needs `layers_to_transform`: say which layer indices to adapt")
        if self.parametrization not in ("offset", "sigmoid"):
            raise ValueError(f"`parametrization` must be 'offset' or 'sigmoid', got {self.parametrization!r}")
        self.rank_pattern = self.rank_pattern or {}
        for name, rank in [("rank", self.rank), *((f"rank_pattern['{k}']", v) for k, v in self.rank_pattern.items())]:
            if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {rank!r}")
        # A fingerprint that is given comes from a checkpoint and is compared with the model; one that the tuner writes
        # later, for saving, says nothing about the next model that this object is used for.
        self.compares_base = self.base_fingerprint is not None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> SVFConfig:
        """As [`~peft.PeftConfig.from_pretrained`], with `basis_source` or `save_basis` to override what was saved."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        for name in {"basis_source", "save_basis"} & kwargs.keys():
            setattr(config, name, kwargs[name])  # for PEFT, what the file says wins
        return config

    @classmethod
    def paper(cls, **kwargs: Any) -> SVFConfig:
        """The parametrization of the paper's released code; other arguments as in [`SVFConfig`].

        A logit p for each singular value, drawn with mean 0.1 and standard deviation 0.01 (the paper prints a variance
        of 1e-3), z = sigmoid(p), and the weight rescaled to keep its nuclear norm:

            W' = U Σ diag(z) Vᵀ · Σᵢσᵢ / Σᵢσᵢzᵢ

        The paper's text does not mention the factor and calls 0.1 the initial mean of z itself, which would destroy
        the model. Equal z mean the base model, so training starts close to it but not at it.
        """
        return cls(parametrization="sigmoid", **kwargs)
