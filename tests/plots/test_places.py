"""Module names become layers and roles, whatever the architecture calls them."""

from __future__ import annotations

import pytest

from peft_svf.plots.places import numbered_layers, places_of


def test_layers_are_in_order_and_roles_in_the_order_of_the_data() -> None:
    names = [f"model.layers.{i}.{role}" for i in (10, 2, 0) for role in ("mlp.down_proj", "self_attn.q_proj")]
    places = places_of([*names, "lm_head"])
    assert places.layers == ("0", "2", "10", "outside")
    assert places.roles == ("q_proj", "down_proj", "lm_head")
    assert places.cells[2, 1] == ("model.layers.10.mlp.down_proj",)
    assert places.cells[3, 2] == ("lm_head",) and (3, 0) not in places.cells


def test_several_stacks_are_told_apart() -> None:
    vision = [f"model.vision_tower.encoder.layers.{i}.mlp.fc1" for i in range(2)]
    places = places_of([*vision, "model.language_model.layers.0.mlp.up_proj"])
    assert places.layers == ("vision_tower 0", "vision_tower 1", "language_model 0")
    names = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.1.EncDecAttention.q"]
    t5 = places_of(names)
    assert t5.layers == ("encoder 0", "decoder 0")
    assert t5.roles == ("EncDecAttention.q", "SelfAttention.q")  # "q" alone would be both


def test_numbered_experts_of_one_layer_share_a_cell() -> None:
    names = [f"model.layers.0.moe.experts.{i}.w1" for i in range(3)]
    places = places_of(names)
    assert places.roles == ("w1",) and places.cells == {(0, 0): tuple(names)}


@pytest.mark.parametrize("name", ["h.0.attn.c_attn", "transformer.h.0.attn.c_attn", "0.c_attn"])
def test_a_layer_may_be_called_anything(name: str) -> None:
    places = places_of([name])
    assert places.layers == ("0",) and places.roles == ("c_attn",)


def test_modules_in_no_layer_have_their_own_names() -> None:
    assert places_of(["lin0", "block2", "3"]).layers == ("outside",)
    assert places_of(["lin0", "block2"]).roles == ("block2", "lin0")


def test_as_many_layers_are_numbered_as_there_is_room_for() -> None:
    assert numbered_layers(["0", "1", "2"]) == [0, 1, 2]
    assert numbered_layers([*map(str, range(80))]) == list(range(0, 80, 5))
    # "outside" is always named, and the layer just above it then is not
    assert numbered_layers([*map(str, range(32)), "outside"]) == [*range(0, 31, 2), 32]
    assert numbered_layers([*map(str, range(81)), "outside"])[-2:] == [75, 81]
