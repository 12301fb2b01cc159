"""torch.compile: an SVF layer is one graph, forward and backward; what is compiled follows every change of state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config
from peft import PeftModel, inject_adapter_in_model
from torch import nn
from transformers import LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from peft_svf import SVFConfig
from peft_svf.tuner import SVFLayer


IDS = torch.randint(3, 97, (2, 8), generator=torch.Generator().manual_seed(0))
Build = Callable[..., LlamaForCausalLM]
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "input side": lambda: nn.Linear(6, 10),
    "output side": lambda: nn.Linear(10, 6),
    "Conv1D": lambda: Conv1D(6, 10),
    "without bias": lambda: nn.Linear(10, 6, bias=False),
}
ADAPTERS = {"all": {}, "some": {"rank": 3}, "paper": {"parametrization": "sigmoid"}}


class Graphs:
    """A backend that runs the graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch.compiler.reset()


def adapted_layer(kind: str) -> nn.Module:
    """A layer with the adapters of `ADAPTERS`, of which the first is active."""
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[kind]())
    nn.init.normal_(model[0].weight)
    for name, settings in ADAPTERS.items():
        inject_adapter_in_model(SVFConfig(target_modules=["0"], init_weights=False, **settings), model, name)
    assert isinstance(model[0], SVFLayer)
    model[0].set_adapter("all")
    return model[0]


STATES: dict[str, Callable[[nn.Module], None]] = {
    "one adapter": lambda layer: None,
    "leading components": lambda layer: layer.set_adapter("some"),
    "paper": lambda layer: layer.set_adapter("paper"),
    "several adapters": lambda layer: layer.set_adapter(list(ADAPTERS)),
    "merged": lambda layer: layer.merge(),
    "disabled": lambda layer: layer.enable_adapters(False),
}


def gradients(layer: nn.Module, function: Callable, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output, and the gradients of the input and of every trained parameter."""
    x = x.clone().requires_grad_()
    output = function(x)
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(output.square().sum(), [x, *parameters], allow_unused=True)
    return output.detach(), [grad for grad in grads if grad is not None]


CASES = [
    *((kind, state) for kind in LAYERS for state in ("one adapter", "several adapters", "merged", "disabled")),
    *(("output side", state) for state in ("leading components", "paper")),
]


@pytest.mark.parametrize(("kind", "state"), CASES)
def test_layer_is_one_graph_forward_and_backward(kind: str, state: str) -> None:
    layer = adapted_layer(kind)
    STATES[state](layer)
    in_features = layer.in_features
    x = torch.randn(3, 4, in_features, generator=torch.Generator().manual_seed(1))
    expected, expected_gradients = gradients(layer, layer, x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")  # fullgraph: a graph break is an error
    output, found = gradients(layer, compiled, x)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    active = {"several adapters": 3, "merged": 0, "disabled": 0}.get(state, 1)
    assert len(found) == len(expected_gradients) == 1 + active
    for grad, expected_grad in zip(found, expected_gradients, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_layer_is_one_graph(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 6).to(dtype))
    inject_adapter_in_model(SVFConfig(target_modules=["0"], init_weights=False), model)
    x = torch.randn(3, 10, dtype=dtype)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=2e-2, atol=2e-2)
    assert compiled(x).dtype == dtype


@torch.no_grad()
def test_a_compiled_layer_follows_every_change_of_state() -> None:
    layer = adapted_layer("output side")
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
    graphs = Graphs()
    compiled = torch.compile(layer, fullgraph=True, backend=graphs)
    changes: list[tuple[str, Callable[[], Any]]] = [
        ("as it is", lambda: None),
        ("another adapter", lambda: layer.set_adapter("some")),
        ("several adapters", lambda: layer.set_adapter(["all", "some"])),
        ("other offsets", lambda: layer.svf_offset["all"].weight.add_(0.5)),
        ("half strength", lambda: layer.svf_strength.update(all=0.5)),
        ("merged", lambda: layer.merge()),
        ("unmerged", lambda: layer.unmerge()),
        ("disabled", lambda: layer.enable_adapters(False)),
        ("enabled", lambda: layer.enable_adapters(True)),
        ("back to the first adapter", lambda: layer.set_adapter("all")),
        ("without an adapter", lambda: layer.delete_adapter("some")),
    ]
    seen: list[torch.Tensor] = []
    for name, change in changes:
        change()
        expected = layer(x)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        seen.append(expected)
    assert not torch.allclose(seen[0], seen[1], atol=1e-3) and not torch.allclose(seen[2], seen[3], atol=1e-3)


@torch.no_grad()
def test_switching_back_to_an_adapter_does_not_compile_again(tiny_llama: Build, add_experts: Callable) -> None:
    model: PeftModel = add_experts(tiny_llama()).eval()
    mlp = model.get_base_model().model.layers[0].mlp
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    graphs = Graphs()
    compiled = torch.compile(mlp, fullgraph=True, backend=graphs)
    outputs = []
    for name in ("math", "code", "math", "code"):
        model.set_adapter(name)
        outputs.append(mlp(x))
        torch.testing.assert_close(compiled(x), outputs[-1], rtol=1e-5, atol=1e-5)
    assert graphs.count == 2 and not torch.allclose(outputs[0], outputs[1], atol=1e-2)


def test_a_whole_model_trains_as_one_graph(tiny_llama: Build, add_experts: Callable) -> None:
    model: PeftModel = add_experts(tiny_llama(num_hidden_layers=1))
    model.base_model.set_adapter(["math", "code"])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 14

    def loss_and_gradients(function: Callable) -> tuple[float, list[torch.Tensor]]:
        loss = function(input_ids=IDS, labels=IDS).loss
        return float(loss), torch.autograd.grad(loss, trained)

    expected_loss, expected = loss_and_gradients(model)
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="eager")
    loss, found = loss_and_gradients(compiled)
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    for grad, expected_grad in zip(found, expected, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_a_compiled_peft_model_follows_its_adapters(tiny_llama: Build, add_experts: Callable) -> None:
    """`torch.compile(peft_model)`, as users write it; PEFT's own code around the model may break the graph."""
    model: PeftModel = add_experts(tiny_llama(num_hidden_layers=1)).eval()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        expected = model(IDS).logits
        torch.testing.assert_close(compiled(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(IDS).logits, expected, atol=1e-2)


def test_one_layer_through_the_default_backend() -> None:
    layer = adapted_layer("output side")
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
    expected, expected_gradients = gradients(layer, layer, x)
    with torch._inductor.config.patch(compile_threads=1):  # no pool of processes for two small kernels
        output, found = gradients(layer, torch.compile(layer, fullgraph=True), x)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    for grad, expected_grad in zip(found, expected_gradients, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-4)
