"""Where a matrix stands in a model, read from its name: its role, its layer, and the tower that the layer is in."""

from __future__ import annotations

from dataclasses import dataclass

from peft_svf.tuner.names import in_layer


# Roles as Llama, Mistral, Qwen, Gemma and most others call them, and what else has them: the last part of a name, or
# the last two where the last alone says too little. An up-projection without a gate counts as the one with a gate.
EQUIVALENTS = {
    "q_proj": ("query", "wq", "SelfAttention.q"),
    "k_proj": ("key", "wk", "SelfAttention.k"),
    "v_proj": ("value", "wv", "SelfAttention.v"),
    "o_proj": (
        "wo",
        "attn.c_proj",  # GPT-2
        "attn.out_proj",  # GPT-J, GPT-Neo, CLIP
        "attention.out_proj",
        "self_attn.out_proj",  # OPT
        "self_attn.dense",  # Phi
        "attention.dense",  # GPT-NeoX
        "self_attention.dense",  # Falcon, Bloom
        "SelfAttention.o",  # T5
    ),
    "gate_proj": ("w1",),
    "up_proj": ("w3", "mlp.c_fc", "fc1", "fc_in", "dense_h_to_4h"),
    "down_proj": ("w2", "mlp.c_proj", "fc2", "fc_out", "dense_4h_to_h"),
    "lm_head": ("embed_out",),
    "fused query, key and value": ("qkv_proj", "c_attn", "query_key_value", "Wqkv", "W_pack", "qkv"),
    "fused gate and up": ("gate_up_proj",),
}
FUSED = {
    "fused query, key and value": ("q_proj", "k_proj", "v_proj"),
    "fused gate and up": ("gate_proj", "up_proj"),
}
ROUTED = "a routed expert"
_ROLES = {ending: role for role, endings in EQUIVALENTS.items() for ending in (role, *endings)}
_TOWERS = (("vision", ("vision", "visual", "image")), ("audio", ("audio", "speech")), ("encoder", ("encoder",)))
_CONTEXTS = {
    "cross attention": ("cross_attn", "encoder_attn", "crossattention", "EncDecAttention", "cross_attention"),
    "shared expert": ("shared_expert", "shared_experts", "shared_mlp"),
}


@dataclass(frozen=True)
class Place:
    """
    Where a matrix stands.

    Args:
        tower (`str`): `"text"`, or `"vision"`, `"audio"`, `"encoder"`.
        role (`str`): What the matrix is for, in the words of `EQUIVALENTS` where they have it.
        layer (`int`, *optional*): Its layer, from 0; `None` outside of the layers.
    """

    tower: str
    role: str
    layer: int | None

    @classmethod
    def of(cls, name: str) -> Place:
        """The place that a module's name tells, like "model.layers.3.mlp.up_proj"."""
        stack, layer, tail = in_layer(name) or (name, None, name)
        tower = next((tower for tower, words in _TOWERS if any(word in stack.lower() for word in words)), "text")
        return cls(tower, _role(tail.split(".")), layer)

    @property
    def is_routed(self) -> bool:
        """Whether it is one of the experts of a mixture-of-experts layer, whose numbers mean nothing elsewhere."""
        return self.role.startswith(ROUTED)


def _role(parts: list[str]) -> str:
    ending = ".".join(parts[-2:])
    role = _ROLES.get(ending) or _ROLES.get(parts[-1]) or ending
    if "experts" in parts:
        return f"{ROUTED}'s {role}"
    context = next((name for name, words in _CONTEXTS.items() if not set(words).isdisjoint(parts)), None)
    return f"{context}'s {role}" if context else role
