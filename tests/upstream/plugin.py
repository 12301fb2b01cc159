"""A pytest plugin that runs PEFT's own tests with SVF, without editing one line of them.

The lists of cases in the decorators of PEFT's tests are replaced by those of cases.py while pytest collects, and tests
that have none are left out. The few places where the tests themselves need another environment are in `CHANGES`, and
the tests that cannot run in `SKIPPED`; report.py prints both.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from cases import FAST, INLINE_LISTS, SHARED_LISTS, SquareMLP
from huggingface_hub import try_to_load_from_cache
from report import Report

from peft_svf import SVFConfig


COMPILE = "test_torch_compile"  # PEFT runs it only when asked to
if os.environ.get("PEFT_DEBUG_WITH_TORCH_COMPILE") != "1":
    INLINE_LISTS.pop(COMPILE)
MODULES = sorted({*SHARED_LISTS, *INLINE_LISTS})
CHANGES = [
    ("every test", "the Hub cache holds random tiny models (tiny_hub.py), and answers for the Hub"),
    ("test_custom_models", "a model with a square weight, SquareMLP, is added to those of the tests"),
    (
        "TestRequiresGrad",
        "DeepMLP is seeded: the tests load an adapter onto a second random model, which SVF refuses as another base",
    ),
    ("test_[generate_with_]mixed_adapter_batches", "SVFConfig passes where the tests let only LoraConfig pass"),
    ("Conv1D and weighted adapters", "SVFConfig passes where the tests let only IA3Config and three others pass"),
    (
        "test_merge_layers[_multi, _nan, _fp16]",
        "check_beft_config is not called: it skips Llama and Gemma for every method, but is about BEFT only",
    ),
    ("test_torch_compile", "only with PEFT_DEBUG_WITH_TORCH_COMPILE=1, as in PEFT; trains on sentences made here"),
    (
        "test_target_parameters",
        "errors are expected to name svf.ParamWrapper; add_weighted_adapter, which LoRA refuses here, must work",
    ),
]
SKIPPED: dict[str, tuple[str, Callable[[dict[str, Any]], bool]]] = {
    "test_from_pretrained_cache_dir": ("Downloads from the Hub into an empty cache folder.", lambda parameters: True),
    **dict.fromkeys(
        ("test_causal_lm_training_trainer_compile", "test_causal_lm_training_pytorch_compile"),
        ("torch.compile needs a C++ compiler.", lambda parameters: shutil.which("g++") is None),
    ),
    "test_weighted_combination_of_adapters": (
        "SVF refuses to mix adapters that hold trained token embeddings: PEFT would drop those silently.",
        lambda parameters: "trainable_token_indices" in parameters["config_kwargs"],
    ),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="only the fast part")
    parser.addoption("--minimum", type=int, default=0, help="fail if fewer tests than this ran")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "svf: a case of cases.py")
    if not hasattr(config, "workerinput"):  # reports come together in the controller of pytest-xdist
        config.pluginmanager.register(Report(CHANGES, config.getoption("--minimum")), "svf-report")
        if config.getoption("numprocesses"):
            return  # it runs no tests itself
    config.pluginmanager.register(_Substitution(config), "svf-substitution")
    _prepare_modules()
    if COMPILE in MODULES:  # a compiler that was killed leaves broken files in the cache that all processes share
        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name


def _prepare_modules() -> None:
    """Import PEFT's test modules, and set in them what `CHANGES` says."""
    pytest.register_assert_rewrite("tests.testing_common", *(f"tests.{name}" for name in MODULES))
    _import_without_diffusers(MODULES)
    sys.modules["tests.testing_utils"]._HUB_MODEL_ACCESSES = _EverythingIsCached()
    peft.utils.save_and_load.check_file_exists_on_hf_hub = _is_cached
    sys.modules["tests.test_decoder_models"].check_beft_config = lambda *args: None
    _add_square_model(sys.modules["tests.test_custom_models"].MockTransformerWrapper)
    _expect_svf_errors(sys.modules["tests.test_target_parameters"])
    if COMPILE in MODULES:
        sys.modules[f"tests.{COMPILE}"].load_dataset_english_quotes = _quotes


class _EverythingIsCached(dict):
    """Says of every repository that it was accessed before, so that PEFT's `hub_online_once` goes offline for it."""

    def __contains__(self, repository: object) -> bool:
        return True

    def __missing__(self, repository: str) -> int:
        return 1


def _is_cached(repository: str, filename: str) -> bool:
    return isinstance(try_to_load_from_cache(repository, filename), str)


def _quotes() -> datasets.DatasetDict:
    rows = [
        {"quote": f"Number {i} is followed by number {i + 1}.", "author": "a table", "tags": []} for i in range(20)
    ]
    return datasets.DatasetDict(train=datasets.Dataset.from_list(rows))


def _import_without_diffusers(names: list[str]) -> None:
    """Import PEFT's test modules. Some name a class of diffusers, which none of the tests here use."""
    missing = importlib.util.find_spec("diffusers") is None
    if missing:
        sys.modules["diffusers"] = types.ModuleType("diffusers")
        sys.modules["diffusers"].StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    try:
        for name in names:
            importlib.import_module(f"tests.{name}")
    finally:
        if missing:
            del sys.modules["diffusers"]


def _add_square_model(factory: Any) -> None:
    original = factory.from_pretrained.__func__

    def from_pretrained(cls: type, model_id: str, dtype: torch.dtype | None = None) -> torch.nn.Module:
        if model_id != "SquareMLP":
            return original(cls, model_id, dtype)
        torch.manual_seed(0)
        return SquareMLP().to(dtype or torch.float32)

    factory.from_pretrained = classmethod(from_pretrained)


def _expect_svf_errors(module: types.ModuleType) -> None:
    """Give `module` a `pytest` of its own, whose `raises` expects of SVF what the module expects of LoRA, but for the
    name of the class in messages, and for an error that SVF does not raise because it can do what is asked."""

    def raises(error: type[Exception], match: str, **kwargs: Any) -> AbstractContextManager[Any]:
        if "add_weighted_adapter does not support" in match:
            return nullcontext()
        return pytest.raises(error, match=match.replace("lora.ParamWrapper", "svf.ParamWrapper"), **kwargs)

    own = types.ModuleType("pytest")
    own.__dict__.update(vars(pytest), raises=raises)
    module.pytest = own


class _Substitution:
    """Replaces lists of cases while pytest collects, and leaves out every test that has no SVF case."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.seen: set[str] = set()
        self.used: set[tuple[str, str]] = set()

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        return True if collection_path.is_file() and collection_path.stem not in MODULES else None

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        self.seen.add(_module_name(metafunc))
        markers = metafunc.definition.own_markers
        markers[:] = [self._substitute(metafunc, marker) for marker in markers]

    def _substitute(self, metafunc: pytest.Metafunc, marker: pytest.Mark) -> pytest.Mark:
        if marker.name != "parametrize":
            return marker
        cases = self._find_cases(metafunc, *marker.args[:2])
        if cases is None:
            return marker
        names = [name.strip() for name in marker.args[0].split(",")]
        rows = [pytest.param(*(case if len(names) > 1 else [case]), marks=pytest.mark.svf) for case in cases]
        kwargs = {key: value for key, value in marker.kwargs.items() if key != "ids" or callable(value)}
        return pytest.mark.parametrize(names, rows, **kwargs).mark

    def _find_cases(self, metafunc: pytest.Metafunc, names: str, upstream: Any) -> list[Any] | None:
        module = _module_name(metafunc)
        for variable, cases in SHARED_LISTS.get(module, {}).items():
            if getattr(metafunc.module, variable, None) is upstream:
                self.used.add((module, variable))
                return cases
        for test, arguments, cases in INLINE_LISTS.get(module, []):
            if test == metafunc.definition.originalname and arguments == names:
                self.used.add((module, test))
                return cases
        return None

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self._check_that_all_lists_were_found()
        selected = [item for item in items if item.get_closest_marker("svf")]
        if self.config.getoption("--fast"):
            selected = [item for item in selected if _is_fast(item)]
        for item in selected:
            reason, applies = SKIPPED.get(item.originalname, ("", None))
            if applies and applies(item.callspec.params):
                item.add_marker(pytest.mark.skip(reason=reason))
        rest = set(items) - set(selected)
        if rest:
            self.config.hook.pytest_deselected(items=list(rest))
        items[:] = selected

    def _check_that_all_lists_were_found(self) -> None:
        if any("::" in argument for argument in self.config.args):
            return  # single tests were asked for
        expected = [(module, variable) for module, lists in SHARED_LISTS.items() for variable in lists]
        expected += [(module, test) for module, lists in INLINE_LISTS.items() for test, _, _ in lists]
        missing = [".".join(name) for name in expected if name[0] in self.seen and name not in self.used]
        if missing:
            raise pytest.UsageError(f"this version of PEFT has no {', '.join(missing)}: adapt cases.py")


def _module_name(node: pytest.Metafunc | pytest.Item) -> str:
    return node.module.__name__.rpartition(".")[2]


def _is_fast(item: pytest.Item) -> bool:
    return FAST.get(_module_name(item), lambda parameters: False)(item.callspec.params)


@pytest.fixture(autouse=True)
def _svf_passes_gates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests such as `if config_cls != LoraConfig: pytest.skip(...)` read the name when they run."""
    common = sys.modules["tests.testing_common"]
    monkeypatch.setattr(common, "IA3Config", SVFConfig)
    if request.node.originalname in ("test_mixed_adapter_batches", "test_generate_with_mixed_adapter_batches"):
        for module in (common, request.module):
            if hasattr(module, "LoraConfig"):
                monkeypatch.setattr(module, "LoraConfig", SVFConfig)


@pytest.fixture(autouse=True)
def _seed_second_base_model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.cls is None or request.cls.__name__ != "TestRequiresGrad":
        return

    class SeededDeepMLP(request.module.DeepMLP):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                super().__init__(*args, **kwargs)

    monkeypatch.setattr(request.module, "DeepMLP", SeededDeepMLP)
