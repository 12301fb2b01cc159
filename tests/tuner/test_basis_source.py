"""Singular bases from elsewhere: a checkpoint, read tensor by tensor (`basis_source`), or the expert's own file
(`save_basis`).
"""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from peft_svf import SVFConfig
from peft_svf.tuner import SVFLayer, checkpoint_weights
from peft_svf.tuner.checkpoint_weights import CheckpointWeights


IDS = torch.randint(3, 97, (2, 8), generator=torch.Generator().manual_seed(0))
Build = Callable[..., LlamaForCausalLM]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n}


def adapted(model: nn.Module) -> dict[str, SVFLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SVFLayer)}


def save_in_shards(model: LlamaForCausalLM, path: Path) -> dict[str, str]:
    model.save_pretrained(path, max_shard_size="20KB")
    weight_map = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weight_map.values())) > 2 and not (path / "model.safetensors").exists()
    return weight_map


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """(file, key) of every tensor that is read from a checkpoint; none may be alive when the next is read."""
    reads: list[tuple[str, str]] = []
    alive: list[weakref.ref[torch.Tensor]] = []
    original = checkpoint_weights.safe_open

    class Counting:
        def __init__(self, path: Path, **kwargs: Any) -> None:
            self.path, self.kwargs = path, kwargs

        def __enter__(self) -> Counting:
            self.file = original(self.path, **self.kwargs).__enter__()
            return self

        def __exit__(self, *args: object) -> None:
            self.file.__exit__(*args)

        def keys(self) -> list[str]:
            return self.file.keys()

        def get_tensor(self, key: str) -> torch.Tensor:
            assert all(tensor() is None for tensor in alive), f"more than one tensor in memory when '{key}' is read"
            tensor = self.file.get_tensor(key)
            alive.append(weakref.ref(tensor))
            reads.append((Path(self.path).name, key))
            return tensor

    monkeypatch.setattr(checkpoint_weights, "safe_open", Counting)
    yield reads


# Reading a checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharded", [False, True])
def test_every_weight_is_read_as_it_is_stored(
    tiny_llama: Build, tmp_path: Path, sharded: bool, dtype: torch.dtype
) -> None:
    model = tiny_llama(hidden_size=64).to(dtype)
    save_in_shards(model, tmp_path) if sharded else model.save_pretrained(tmp_path)
    weights = CheckpointWeights(str(tmp_path))
    for name, module in linears(model).items():
        read = weights.read(name)
        assert read.dtype == dtype and torch.equal(read, module.weight)


def test_only_the_shards_and_tensors_of_adapted_modules_are_read_one_at_a_time(
    tiny_llama: Build, tmp_path: Path, opened: list[tuple[str, str]]
) -> None:
    weight_map = save_in_shards(tiny_llama(hidden_size=64), tmp_path)
    wanted = [f"model.layers.{i}.self_attn.{kind}.weight" for i in (0, 1) for kind in ("q_proj", "o_proj")]
    needed = {weight_map[key] for key in wanted}
    for shard in set(weight_map.values()) - needed:
        (tmp_path / shard).unlink()
    config = SVFConfig(target_modules=["q_proj", "o_proj"], basis_source=str(tmp_path))
    model = get_peft_model(tiny_llama(hidden_size=64), config)
    assert sorted(opened) == sorted((weight_map[key], key) for key in wanted)
    assert len(adapted(model)) == 4


def test_the_basis_is_that_of_the_checkpoint(tiny_llama: Build, tmp_path: Path) -> None:
    """Of float32 weights for a bfloat16 model: not of its own, rounded ones."""
    tiny_llama().save_pretrained(tmp_path)
    expected = adapted(get_peft_model(tiny_llama(), SVFConfig()))
    own = adapted(get_peft_model(tiny_llama().bfloat16(), SVFConfig()))
    for name, layer in adapted(get_peft_model(tiny_llama().bfloat16(), SVFConfig(basis_source=str(tmp_path)))).items():
        assert torch.equal(layer.svf_basis, expected[name].svf_basis)
        assert layer.svf_sketch == expected[name].svf_sketch != own[name].svf_sketch
        assert not torch.allclose(layer.svf_basis.abs(), own[name].svf_basis.float().abs(), atol=1e-3)


@pytest.mark.parametrize("headless", ["model", "checkpoint"])
def test_one_component_more_or_less_in_front_is_found(tiny_llama: Build, tmp_path: Path, headless: str) -> None:
    (tiny_llama().model if headless == "checkpoint" else tiny_llama()).save_pretrained(tmp_path)
    base = tiny_llama().model if headless == "model" else tiny_llama()
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert ("model.layers.0.mlp.up_proj.weight" in keys) is (headless == "model")
    expected = adapted(get_peft_model(tiny_llama(), SVFConfig()))
    layers = adapted(get_peft_model(base, SVFConfig(target_modules=["up_proj"], basis_source=str(tmp_path))))
    assert len(layers) == 2
    for name, layer in layers.items():
        other = next(other for key, other in expected.items() if key.endswith(name.removeprefix("base_model.model.")))
        assert torch.equal(layer.svf_basis, other.svf_basis)


def test_conv1d_weights_are_read_in_their_own_layout(tmp_path: Path) -> None:
    def build() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=32, n_embd=16, n_layer=1, n_head=2)).eval()

    build().save_pretrained(tmp_path)
    expected = adapted(get_peft_model(build(), SVFConfig()))
    for name, layer in adapted(get_peft_model(build(), SVFConfig(basis_source=str(tmp_path)))).items():
        assert torch.equal(layer.svf_basis, expected[name].svf_basis)


def rename(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(path / "model.safetensors")), path / "model.safetensors")


def without_up_proj(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != "model.layers.1.mlp.up_proj.weight"}


def with_two_prefixes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    key = "model.layers.1.mlp.up_proj.weight"
    return {**without_up_proj(tensors), f"vision.{key}": tensors[key], f"text.{key}": tensors[key].clone()}


def with_integers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    key = "model.layers.1.mlp.up_proj.weight"
    return {**tensors, key: tensors[key].to(torch.int8)}


def as_gptq(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    key = "model.layers.1.mlp.up_proj"
    return {**without_up_proj(tensors), f"{key}.qweight": torch.zeros(4, 48, dtype=torch.int32)}


def with_another_shape(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    key = "model.layers.1.mlp.up_proj.weight"
    return {**tensors, key: tensors[key].T.contiguous()}


def with_another_weight(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    key = "model.layers.1.mlp.up_proj.weight"
    return {**tensors, key: tensors[key].flip(0).contiguous()}


def with_nan(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_up_proj, r"has no 'model\.layers\.1\.mlp\.up_proj\.weight'.*nearest keys are 'model\.layers\."),
        (as_gptq, r"has no 'model\.layers\.1\.mlp\.up_proj\.weight'.*'model\.layers\.1\.mlp\.up_proj\.qweight'"),
        (with_two_prefixes, r"has several weights that may be .*'text\.model\.layers.*'vision\.model\.layers"),
        (with_integers, r"is quantized \(torch\.int8\); give the unquantized checkpoint"),
        (with_another_shape, r"its shape is \(48, 32\), that in '.*' \(32, 48\)"),
        (with_another_weight, r"is another one: it differs by \d\.\de\+00 of its norm"),
        (with_nan, r"NaN"),
    ],
)
def test_a_source_that_does_not_fit_is_refused_by_the_name_of_the_module(
    tiny_llama: Build, tmp_path: Path, change: Callable[..., Any], message: str
) -> None:
    tiny_llama().save_pretrained(tmp_path)
    rename(tmp_path, change)
    base = tiny_llama()
    expected = logits(base)
    with pytest.raises(ValueError, match=rf"SVF cannot adapt 'model\.layers\.1\.mlp\.up_proj': .*{message}") as caught:
        get_peft_model(base, SVFConfig(basis_source=str(tmp_path)))
    assert "\n" not in str(caught.value)
    assert change is with_nan or str(tmp_path) in str(caught.value)
    assert not adapted(base) and torch.equal(logits(base), expected)


def empty(path: Path) -> None:
    (path / "model.safetensors").unlink()


def pickled_only(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def cut_short(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def not_safetensors(path: Path) -> None:
    (path / "model.safetensors").write_text("no header")


def with_index(content: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / "model.safetensors").rename(path / "model-1.safetensors")
        (path / "model.safetensors.index.json").write_text(content)

    return change


KEY = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (empty, r"has neither model\.safetensors nor model\.safetensors\.index\.json$"),
        (pickled_only, r"only pickled weights \(pytorch_model\.bin\), which are not read: .*`save_pretrained`"),
        (cut_short, r"'model\.safetensors' of '.*' is damaged"),
        (not_safetensors, r"'model\.safetensors' of '.*' is damaged"),
        (with_index("{"), r"'model\.safetensors\.index\.json' of '.*' is damaged"),
        (with_index("[]"), r"'model\.safetensors\.index\.json' of '.*' is damaged"),
        (with_index(json.dumps({"weight_map": {KEY: "../x"}})), r"is damaged: its shards are not plain file names"),
        (with_index(json.dumps({"weight_map": {KEY: "model-2"}})), rf"cannot read '{KEY}' from 'model-2'"),
        (with_index(json.dumps({"weight_map": {KEY + "x": "model-1.safetensors"}})), r"has no 'model\.layers\.0"),
    ],
)
def test_a_damaged_source_is_refused(
    tiny_llama: Build, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    tiny_llama().save_pretrained(tmp_path)
    change(tmp_path)
    base = tiny_llama()
    with pytest.raises(ValueError, match=message) as caught:
        get_peft_model(base, SVFConfig(target_modules=["down_proj"], basis_source=str(tmp_path)))
    assert "\n" not in str(caught.value)
    assert not adapted(base)


def test_an_index_that_points_to_the_wrong_shard_is_refused(tiny_llama: Build, tmp_path: Path) -> None:
    weight_map = save_in_shards(tiny_llama(hidden_size=64), tmp_path)
    key = "model.layers.0.mlp.down_proj.weight"
    index = tmp_path / "model.safetensors.index.json"
    wrong = next(shard for shard in weight_map.values() if shard != weight_map[key])
    index.write_text(json.dumps({"weight_map": {**weight_map, key: wrong}}))
    with pytest.raises(ValueError, match=rf"cannot read '{key}' from '{wrong}'"):
        CheckpointWeights(str(tmp_path)).read("model.layers.0.mlp.down_proj")


# From the Hub


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], Path]:
    """Puts a folder into an empty Hub cache that is cut off from the network: `put("owner/name", folder)`."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"

    def put(repository: str, folder: Path) -> Path:
        root = tmp_path / "cache" / f"models--{repository.replace('/', '--')}"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text(commit)
        return shutil.copytree(folder, root / "snapshots" / commit)

    return put


@pytest.mark.parametrize("sharded", [False, True])
def test_a_hub_id_is_read_from_the_cache(
    tiny_llama: Build, tmp_path: Path, hub_cache: Callable[[str, Path], Path], sharded: bool
) -> None:
    model = tiny_llama(hidden_size=64)
    save_in_shards(model, tmp_path / "base") if sharded else model.save_pretrained(tmp_path / "base")
    hub_cache("someone/base", tmp_path / "base")
    expected = adapted(get_peft_model(tiny_llama(hidden_size=64), SVFConfig()))
    loaded = adapted(get_peft_model(tiny_llama(hidden_size=64), SVFConfig(basis_source="someone/base")))
    assert all(torch.equal(loaded[name].svf_basis, layer.svf_basis) for name, layer in expected.items())


def test_only_the_shards_that_are_needed_have_to_be_in_the_cache(
    tiny_llama: Build, tmp_path: Path, hub_cache: Callable[[str, Path], Path]
) -> None:
    weight_map = save_in_shards(tiny_llama(hidden_size=64), tmp_path / "base")
    snapshot = hub_cache("someone/base", tmp_path / "base")
    needed = weight_map["model.layers.0.mlp.up_proj.weight"]
    missing = next(key for key, shard in weight_map.items() if shard != needed and "mlp" in key)
    for shard in set(weight_map.values()) - {needed}:
        (snapshot / shard).unlink()
    weights = CheckpointWeights("someone/base")
    assert torch.equal(
        weights.read("model.layers.0.mlp.up_proj"), tiny_llama(hidden_size=64).model.layers[0].mlp.up_proj.weight
    )
    with pytest.raises(ValueError, match=rf"cannot read '{missing}' from '{weight_map[missing]}' of 'someone/base'"):
        weights.read(missing.removesuffix(".weight"))


def test_shards_come_from_the_commit_of_the_index(
    tiny_llama: Build, tmp_path: Path, hub_cache: Callable[[str, Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_in_shards(tiny_llama(hidden_size=64), tmp_path / "base")
    hub_cache("someone/base", tmp_path / "base")
    revisions = []

    def recording(*args: Any, revision: str | None = None, **kwargs: Any) -> str:
        revisions.append(revision)
        return huggingface_hub.hf_hub_download(*args, revision=revision, **kwargs)

    monkeypatch.setattr(checkpoint_weights, "hf_hub_download", recording)
    CheckpointWeights("someone/base").read("model.layers.0.mlp.up_proj")
    assert set(revisions) == {None, "0123456789abcdef0123456789abcdef01234567"} and revisions[-1] is not None


@pytest.mark.parametrize("source", ["someone/absent", "no such folder/at all", "/no/such/folder"])
def test_a_source_that_is_nowhere_is_refused_in_one_line(
    tiny_llama: Build, hub_cache: Callable[[str, Path], Path], source: str
) -> None:
    with pytest.raises(ValueError, match=rf"'{source}' is not a folder, and neither model\.safetensors nor") as caught:
        get_peft_model(tiny_llama(), SVFConfig(basis_source=source))
    assert "\n" not in str(caught.value)


def test_a_repository_with_pickled_weights_only_is_refused(
    tiny_llama: Build, tmp_path: Path, hub_cache: Callable[[str, Path], Path]
) -> None:
    (tmp_path / "base").mkdir()
    torch.save(tiny_llama().state_dict(), tmp_path / "base" / "pytorch_model.bin")
    hub_cache("someone/pickled", tmp_path / "base")
    with pytest.raises(ValueError, match=r"pickled weights are not read: .*`save_pretrained`"):
        CheckpointWeights("someone/pickled")


# Several adapters on one model share its bases


def test_a_second_adapter_from_the_same_source_reads_nothing(
    tiny_llama: Build, tmp_path: Path, opened: list[tuple[str, str]]
) -> None:
    tiny_llama().save_pretrained(tmp_path)
    model = get_peft_model(tiny_llama().bfloat16(), SVFConfig(basis_source=str(tmp_path)), "a")
    count = len(opened)
    assert count == 14
    model.add_adapter("b", SVFConfig(basis_source=str(tmp_path)))
    assert len(opened) == count


@pytest.mark.parametrize("first_rank", [None, 4])
@pytest.mark.parametrize("first", ["own", "source"])
def test_bases_of_different_weights_are_not_mixed(
    tiny_llama: Build, tmp_path: Path, first: str, first_rank: int | None
) -> None:
    tiny_llama().save_pretrained(tmp_path)
    sources = {"own": None, "source": str(tmp_path)}
    model = get_peft_model(
        tiny_llama().bfloat16(), SVFConfig(rank=first_rank, init_weights=False, basis_source=sources.pop(first)), "a"
    )
    expected = logits(model)
    (second,) = sources.values()
    if second is None and first_rank is None:
        model.add_adapter("b", SVFConfig())  # takes the basis that is there
    else:
        with pytest.raises(ValueError, match=r"has a singular basis already, of a weight that differs by \d\.\de-03"):
            model.add_adapter("b", SVFConfig(basis_source=second))
        assert list(model.peft_config) == ["a"]
    assert torch.equal(logits(model), expected)


def test_an_adapter_on_borrowed_bases_is_saved_with_their_source(tiny_llama: Build, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    config = SVFConfig(basis_source=str(tmp_path / "base"), init_weights=False)
    model = get_peft_model(tiny_llama().bfloat16(), config, "a")
    model.add_adapter("b", SVFConfig(init_weights=False))
    model.add_weighted_adapter(["a", "b"], [0.5, 0.25], "mixture")
    model.save_pretrained(tmp_path / "expert")
    for name in ("b", "mixture"):
        model.set_adapter(name)
        loaded = PeftModel.from_pretrained(tiny_llama().bfloat16(), tmp_path / "expert" / name)
        assert torch.equal(logits(loaded), logits(model))


# `save_basis`


@pytest.fixture
def no_computation(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """After `no_computation()`, no eigenvalue decomposition may be computed."""

    def forbid() -> None:
        def refuse(*args: object, **kwargs: object) -> None:
            raise AssertionError("a singular basis was computed")

        for function in ("eigh", "svd", "qr"):
            monkeypatch.setattr(torch.linalg, function, refuse)
        monkeypatch.setattr("peft_svf.tuner.bases.cached_singular_basis", refuse)

    return forbid


def expert_with_bases(build: Build, path: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> torch.Tensor:
    """Saves an expert with its bases, and returns its logits."""
    config = SVFConfig(task_type="CAUSAL_LM", init_weights=False, save_basis=True, **settings)
    model = get_peft_model(build().to(dtype), config)
    model.save_pretrained(path, save_embedding_layers=False)
    assert not torch.allclose(logits(model), logits(build().to(dtype)), atol=0.05)
    return logits(model)


def with_peft(base: LlamaForCausalLM, path: Path) -> nn.Module:
    return PeftModel.from_pretrained(base, path)


def with_peft_in_low_memory(base: LlamaForCausalLM, path: Path) -> nn.Module:
    return PeftModel.from_pretrained(base, path, low_cpu_mem_usage=True)


def as_second_adapter(base: LlamaForCausalLM, path: Path) -> nn.Module:
    model = PeftModel.from_pretrained(base, path, "first")
    model.load_adapter(path, "svf_saved_basis")  # a name as difficult as they come
    model.set_adapter("svf_saved_basis")
    return model


def with_transformers(base: LlamaForCausalLM, path: Path) -> nn.Module:
    base.load_adapter(str(path), "math")
    return base


def with_transformers_in_low_memory(base: LlamaForCausalLM, path: Path) -> nn.Module:
    base.load_adapter(str(path), low_cpu_mem_usage=True)
    return base


def with_injection(base: LlamaForCausalLM, path: Path) -> nn.Module:
    inject_adapter_in_model(PeftConfig.from_pretrained(path), base)
    set_peft_model_state_dict(base, load_file(path / "adapter_model.safetensors"))
    return base


LOADERS = [
    with_peft,
    with_peft_in_low_memory,
    as_second_adapter,
    with_transformers,
    with_transformers_in_low_memory,
    with_injection,
]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.float32, {"rank": 5, "rank_pattern": {r"layers\.0\..*": 9}}),
        (torch.float32, {"parametrization": "sigmoid"}),
    ],
    ids=["float32", "bfloat16", "rank", "sigmoid"],
)
def test_loading_bases_computes_nothing_and_gives_equal_logits(
    tiny_llama: Build,
    tmp_path: Path,
    no_computation: Callable[[], None],
    load: Callable[..., nn.Module],
    dtype: torch.dtype,
    settings: dict[str, Any],
) -> None:
    expected = expert_with_bases(tiny_llama, tmp_path, dtype, **settings)
    no_computation()
    model = load(tiny_llama().to(dtype), tmp_path)
    assert torch.equal(logits(model), expected)
    layers = adapted(model)
    assert len(layers) == 14 and {layer.svf_basis.dtype for layer in layers.values()} == {dtype}
    assert not [
        name for name, _ in model.named_modules() if "svf_saved_basis" in name and "." + "svf_offset" not in name
    ]


def test_auto_class_loads_an_expert_with_its_bases(
    tiny_llama: Build, tmp_path: Path, no_computation: Callable[[], None]
) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, SVFConfig(init_weights=False, save_basis=True))
    model.save_pretrained(tmp_path / "expert", save_embedding_layers=False)
    no_computation()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "expert")), logits(model))


def test_the_file_holds_offsets_and_the_columns_in_use(tiny_llama: Build, tmp_path: Path) -> None:
    config = SVFConfig(rank=5, save_basis=True, target_modules=["up_proj"])
    model = get_peft_model(tiny_llama().bfloat16(), config)
    model.add_adapter("full", SVFConfig(target_modules=["up_proj"]))  # the layer then keeps all 32 columns
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.mlp.up_proj"
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items() if name.startswith(key)} == {
        f"{key}.svf_offset.weight": ((5,), torch.float32),
        f"{key}.svf_saved_basis.vectors": ((32, 5), torch.bfloat16),
        f"{key}.svf_saved_basis.singular_values": ((32,), torch.float32),
    }
    assert len(tensors) == 6


def test_an_expert_that_was_loaded_with_its_bases_is_saved_with_them_again(tiny_llama: Build, tmp_path: Path) -> None:
    expected = expert_with_bases(tiny_llama, tmp_path / "first")
    PeftModel.from_pretrained(tiny_llama(), tmp_path / "first").save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "again")), expected)


def test_a_transformers_model_saves_its_adapter_with_the_bases(
    tiny_llama: Build, tmp_path: Path, no_computation: Callable[[], None]
) -> None:
    model = tiny_llama()
    model.add_adapter(SVFConfig(init_weights=False, save_basis=True))
    model.save_pretrained(tmp_path)
    no_computation()
    assert torch.equal(logits(with_transformers(tiny_llama(), tmp_path)), logits(model))


def test_saved_bases_may_be_ignored(tiny_llama: Build, tmp_path: Path) -> None:
    expected = expert_with_bases(tiny_llama, tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    config.save_basis = False
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path, config=config)), expected)


def lacks_one(tensors: dict[str, torch.Tensor], key: str) -> None:
    del tensors[f"{key}.svf_saved_basis.vectors"]


def lacks_all(tensors: dict[str, torch.Tensor], key: str) -> None:
    for name in [name for name in tensors if "svf_saved_basis" in name]:
        del tensors[name]


def holds_nan(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[f"{key}.svf_saved_basis.vectors"][3, 4] = torch.nan


def holds_infinity(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[f"{key}.svf_saved_basis.singular_values"][3] = torch.inf


def is_cut(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[f"{key}.svf_saved_basis.vectors"] = tensors[f"{key}.svf_saved_basis.vectors"][:-1].clone()


def has_few_values(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[f"{key}.svf_saved_basis.singular_values"] = torch.ones(3)


def is_flat(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[f"{key}.svf_saved_basis.vectors"] = torch.tensor(1.0)


DAMAGES = [lacks_one, lacks_all, holds_nan, holds_infinity, is_cut, has_few_values, is_flat]


def damaged(build: Build, path: Path, damage: Callable[..., None]) -> None:
    expert_with_bases(build, path)
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    damage(tensors, "base_model.model.model.layers.1.mlp.up_proj")
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("load", [with_peft, with_peft_in_low_memory])
def test_a_damaged_basis_is_refused_and_the_base_model_is_left_as_it_was(
    tiny_llama: Build, tmp_path: Path, damage: Callable[..., None], load: Callable[..., nn.Module]
) -> None:
    damaged(tiny_llama, tmp_path, damage)
    base = tiny_llama()
    name = r"model\.layers\.0" if damage is lacks_all else r"model\.layers\.1\.mlp\.up_proj"
    with pytest.raises(ValueError, match=rf"basis of '{name}") as caught:
        load(base, tmp_path)
    assert "\n" not in str(caught.value)
    assert not adapted(base) and torch.equal(logits(base), logits(tiny_llama()))
    assert torch.equal(logits(get_peft_model(base, SVFConfig())), logits(tiny_llama()))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_second_adapter_leaves_the_first_as_it_was(
    tiny_llama: Build, tmp_path: Path, damage: Callable[..., None]
) -> None:
    damaged(tiny_llama, tmp_path, damage)
    model = get_peft_model(tiny_llama(), SVFConfig(target_modules=["q_proj"], init_weights=False), "first")
    expected = logits(model)
    with pytest.raises(ValueError, match="basis of 'model"):
        model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == ["first"] and len(adapted(model)) == 2
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("damage", [lacks_one, lacks_all, holds_nan, holds_infinity])
def test_transformers_meets_a_damaged_basis_at_the_first_forward(
    tiny_llama: Build, tmp_path: Path, damage: Callable[..., None]
) -> None:
    damaged(tiny_llama, tmp_path, damage)
    model = with_transformers(tiny_llama(), tmp_path)
    with pytest.raises(RuntimeError, match=r"saved singular basis of '\S+_proj' holds NaN.*were not loaded"):
        logits(model)


def test_a_basis_that_was_never_loaded_is_an_error_at_the_first_use(tiny_llama: Build, tmp_path: Path) -> None:
    expert_with_bases(tiny_llama, tmp_path)
    model = inject_adapter_in_model(PeftConfig.from_pretrained(tmp_path), tiny_llama())
    for use in (logits, lambda model: [layer.merge() for layer in adapted(model).values()]):
        with pytest.raises(RuntimeError, match=r"saved singular basis of '.*' holds NaN.*were not loaded"):
            use(model)


def test_deleting_an_adapter_that_waits_for_its_basis_leaves_nothing_behind(tiny_llama: Build, tmp_path: Path) -> None:
    expert_with_bases(tiny_llama, tmp_path, rank=8)
    model = get_peft_model(tiny_llama(), SVFConfig(rank=2, init_weights=False), "first")
    expected = logits(model)
    model.add_adapter("second", PeftConfig.from_pretrained(tmp_path))
    model.delete_adapter("second")
    assert torch.equal(logits(model), expected)


def test_a_basis_of_another_base_model_is_refused(tiny_llama: Build, tmp_path: Path) -> None:
    expert_with_bases(tiny_llama, tmp_path)
    with pytest.raises(ValueError, match=r"belongs to another base model"):
        PeftModel.from_pretrained(tiny_llama(seed=1), tmp_path)


def test_a_damaged_fingerprint_is_refused_when_the_bases_come_along(tiny_llama: Build, tmp_path: Path) -> None:
    expert_with_bases(tiny_llama, tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    del config["base_fingerprint"]["model.layers.0.self_attn.v_proj"]
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lacks the fingerprint of 'model\.layers\.0\.self_attn\.v_proj'"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
