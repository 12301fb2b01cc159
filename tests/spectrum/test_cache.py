"""The cache of singular bases: what it returns is the computed basis, whatever happens to the folder."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_svf.spectrum import SingularBasis, cache, cached_singular_basis, singular_basis, weight_change, weight_sketch


SHAPES = [(256, 256), (300, 256), (256, 300)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of this test, which does not exist yet."""
    monkeypatch.setenv("PEFT_SVF_CACHE", str(tmp_path / "bases"))
    monkeypatch.delenv("PEFT_SVF_CACHE_SIZE", raising=False)
    return tmp_path / "bases"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the weights whose basis was computed so far."""
    shapes = []

    def count(weight: torch.Tensor) -> SingularBasis:
        shapes.append(weight.shape)
        return singular_basis(weight)

    monkeypatch.setattr(cache, "singular_basis", count)
    return shapes


def random_weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def get(weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> SingularBasis:
    return cached_singular_basis(weight, weight_sketch(weight), dtype)


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def rewrite(path: Path, **changed: torch.Tensor) -> None:
    """Change tensors in a file of the cache and keep its metadata."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({**load_file(path), **changed}, path, metadata)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_second_call_reads_what_the_first_one_computed(
    shape: tuple[int, int], dtype: torch.dtype, computed: list[torch.Size]
) -> None:
    weight = random_weight(*shape)
    first, second = get(weight, dtype), get(weight.clone(), dtype)
    assert computed == [shape]
    exact = singular_basis(weight)
    for basis in (first, second):
        assert basis.side == exact.side
        assert basis.vectors.is_contiguous() and torch.equal(basis.vectors, exact.vectors.to(dtype))
        assert basis.singular_values.dtype == torch.float64
        assert torch.equal(basis.singular_values, exact.singular_values)


def test_basis_from_the_cache_gives_the_two_sided_weight_change() -> None:
    weight, offset = random_weight(300, 256), torch.linspace(-0.5, 0.5, 256, dtype=torch.float64)
    get(weight, torch.float64)
    change = weight_change(weight, get(weight, torch.float64), offset)
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close(change, u @ torch.diag(s * offset) @ vh, rtol=0, atol=1e-11 * float(s[0]))


def test_basis_from_the_cache_does_not_live_in_the_file(folder: Path) -> None:
    weight = random_weight(256, 256)
    get(weight)
    basis = get(weight)
    vectors, singular_values = basis.vectors.clone(), basis.singular_values.clone()
    os.truncate(only_file(folder), 0)  # would kill the process if a tensor were mapped
    assert torch.equal(basis.vectors, vectors) and torch.equal(basis.singular_values, singular_values)


def test_small_weights_are_computed_and_not_stored(folder: Path, computed: list[torch.Size]) -> None:
    weight = random_weight(255, 1000)
    assert torch.equal(get(weight).vectors, get(weight).vectors)
    assert len(computed) == 2
    assert not folder.exists()


def test_every_weight_and_dtype_has_a_file_of_its_own(folder: Path, computed: list[torch.Size]) -> None:
    weight = random_weight(256, 256)
    weights = [weight, -weight, random_weight(256, 256, seed=1), random_weight(300, 256)]
    for _ in range(2):
        for weight in weights:
            for dtype in (torch.float32, torch.bfloat16):
                assert torch.equal(get(weight, dtype).vectors, singular_basis(weight).vectors.to(dtype))
    assert len(computed) == 8
    names = sorted(path.name.rsplit("-", 1)[0] for path in folder.iterdir())
    assert names == ["256x256-bfloat16"] * 3 + ["256x256-float32"] * 3 + ["300x256-bfloat16", "300x256-float32"]


def test_one_changed_entry_is_another_weight(computed: list[torch.Size]) -> None:
    weight = random_weight(256, 256)
    get(weight)
    changed = weight.clone()
    changed[17, 93] = torch.nextafter(weight[17, 93], torch.tensor(1.0))
    assert torch.equal(get(changed).vectors, singular_basis(changed).vectors.float())
    assert len(computed) == 2


def test_sketch_from_another_device_finds_the_file(computed: list[torch.Size]) -> None:
    weight = random_weight(256, 256)
    get(weight)
    sketch = [value * (1 + 1e-14) if index > 1 else value for index, value in enumerate(weight_sketch(weight))]
    cached_singular_basis(weight, sketch, torch.float32)
    assert len(computed) == 1


def test_file_of_another_weight_under_the_same_name_is_replaced(
    folder: Path, computed: list[torch.Size], recwarn: pytest.WarningsRecorder
) -> None:
    weight, other = random_weight(256, 256), random_weight(256, 256, seed=1)
    get(weight)
    name = only_file(folder).name
    only_file(folder).unlink()
    get(other)
    only_file(folder).rename(folder / name)
    assert torch.equal(get(weight).vectors, singular_basis(weight).vectors.float())
    get(weight)
    assert len(computed) == 3
    assert not recwarn.list


def test_sketch_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="sketch is that of another weight"):
        cached_singular_basis(random_weight(256, 256), weight_sketch(random_weight(256, 300)), torch.float32)


@pytest.mark.parametrize(
    ("value", "message"), [(0.0, "is zero"), (float("nan"), "NaN or infinite"), (float("inf"), "NaN or infinite")]
)
def test_weights_without_a_basis_are_named(value: float, message: str, folder: Path) -> None:
    weight = torch.full((256, 256), value)
    with pytest.raises(ValueError, match=message):
        get(weight)
    assert not folder.exists()


def nan_vectors(path: Path) -> None:
    vectors = load_file(path)["vectors"]
    vectors[5, 7] = float("nan")
    rewrite(path, vectors=vectors)


def zeroed_page(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(4096))


def without_metadata(path: Path) -> None:
    save_file(load_file(path), path)


def sketch_that_is_no_list(path: Path) -> None:
    save_file(load_file(path), path, {"sketch": "null", "side": "input"})


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1000),
    "not safetensors": lambda path: path.write_bytes(os.urandom(5000)),
    "nan": nan_vectors,
    "zeroed page": zeroed_page,
    "other shape": lambda path: rewrite(path, vectors=torch.eye(8)),
    "other dtype": lambda path: rewrite(path, vectors=torch.eye(256, dtype=torch.float64)),
    "singular values in float32": lambda path: rewrite(path, singular_values=torch.ones(256)),
    "ascending singular values": lambda path: rewrite(path, singular_values=torch.arange(256.0).double()),
    "no metadata": without_metadata,
    "sketch is no list": sketch_that_is_no_list,
    "no vectors": lambda path: save_file({"x": torch.ones(1)}, path, safe_open(path, "pt").metadata()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_computed_again_and_replaced_with_one_warning(
    damage: str, folder: Path, computed: list[torch.Size]
) -> None:
    weight = random_weight(256, 256)
    whole = get(weight)
    path = only_file(folder)
    DAMAGES[damage](path)
    with pytest.warns(UserWarning, match=path.name) as warned:
        again = get(weight)
    assert len(warned) == 1
    assert torch.equal(again.vectors, whole.vectors)
    get(weight)  # no warning: pytest.warns above has swallowed the only one
    assert len(computed) == 2
    assert only_file(folder) == path


def test_folder_defaults_to_the_one_of_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEFT_SVF_CACHE")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    get(random_weight(256, 256))
    assert only_file(tmp_path / "hf" / "peft_svf" / "singular_bases").suffix == ".safetensors"


@pytest.mark.parametrize("value", ["off", "OFF", "0"])
def test_caching_can_be_turned_off(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computed: list[torch.Size]
) -> None:
    monkeypatch.setenv("PEFT_SVF_CACHE", value)
    monkeypatch.setenv("PEFT_SVF_CACHE_SIZE", "nonsense")  # of no interest then
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)
    weight = random_weight(256, 256)
    get(weight)
    get(weight)
    assert len(computed) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "size"),
    [("20GB", 20 * 10**9), ("1.5 gb", 15 * 10**8), ("2GiB", 2**31), ("123", 123), ("7B", 7), ("", 50 * 10**9)],
)
def test_size_limit_is_read(text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_SVF_CACHE_SIZE", text)
    assert cache.cache_limit() == size


@pytest.mark.parametrize("text", ["many", "-1GB", "20 bytes", "1e9", "nan", "GB"])
def test_size_limit_that_is_none_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_SVF_CACHE_SIZE", text)
    with pytest.raises(ValueError, match=f"PEFT_SVF_CACHE_SIZE is '{text}'.*20GB"):
        get(random_weight(256, 256))


def test_least_recently_used_files_make_room(
    folder: Path, monkeypatch: pytest.MonkeyPatch, computed: list[torch.Size]
) -> None:
    weights = [random_weight(256, 256, seed=seed) for seed in range(4)]
    for age, weight in enumerate(weights[:3]):
        known = set(folder.glob("*")) if age else set()
        get(weight)
        (new,) = set(folder.iterdir()) - known
        os.utime(new, (age + 1, age + 1))  # the first is the oldest
    foreign = folder / "thesis.safetensors"
    foreign.write_bytes(bytes(10**6))
    get(weights[0])  # now the last used
    size = next(folder.glob("256x256-*")).stat().st_size
    monkeypatch.setenv("PEFT_SVF_CACHE_SIZE", str(3 * size + 10))
    get(weights[3])
    assert len(list(folder.glob("256x256-*"))) == 3 and foreign.exists()
    del computed[:]
    for weight in (weights[0], weights[2], weights[3]):
        get(weight)
    assert not computed
    get(weights[1])
    assert len(computed) == 1


def test_newest_file_stays_even_if_its_time_is_the_oldest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [random_weight(256, 256, seed=seed) for seed in range(2)]
    get(weights[0])
    old = only_file(folder)
    os.utime(old, (time.time() + 1e6,) * 2)  # a server whose clock is ahead
    monkeypatch.setenv("PEFT_SVF_CACHE_SIZE", str(old.stat().st_size + 10))
    get(weights[1])
    assert only_file(folder) != old


def test_file_above_the_limit_is_not_kept_and_takes_no_other_with_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    get(random_weight(256, 256))
    kept = only_file(folder)
    monkeypatch.setenv("PEFT_SVF_CACHE_SIZE", str(kept.stat().st_size))
    get(random_weight(300, 300))
    assert only_file(folder) == kept
    assert not recwarn.list


def test_leftovers_of_killed_processes_go_when_something_is_stored(folder: Path) -> None:
    get(random_weight(256, 256))
    stem = only_file(folder).stem
    old = [folder / f".{stem}.{'a' * 32}.partial", folder / f".{stem}.lock"]
    kept = [folder / f".{stem}.{'b' * 32}.partial", folder / ".hidden.partial"]
    for path in (*old, *kept):
        path.write_bytes(b"half")
    for path in (*old, kept[1]):
        os.utime(path, (time.time() - 2 * cache.LEFTOVER_SECONDS,) * 2)
    get(random_weight(256, 256, seed=1))
    assert not any(path.exists() for path in old)
    assert all(path.exists() for path in kept)  # one may be being written, the other is not ours


def test_files_can_be_read_by_others_as_the_umask_says(folder: Path) -> None:
    before = os.umask(0o022)
    try:
        get(random_weight(256, 256))
    finally:
        os.umask(before)
    assert only_file(folder).stat().st_mode & 0o777 == 0o644


def test_full_disk_means_no_caching_and_one_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, computed: list[torch.Size]
) -> None:
    stored, missing, another = (random_weight(256, 256, seed=seed) for seed in range(3))
    get(stored)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.warns(UserWarning, match="No space left on device.*PEFT_SVF_CACHE") as warned:
        for weight in (missing, another, missing, stored):
            assert torch.equal(get(weight).vectors, singular_basis(weight).vectors.float())
    assert len(warned) == 1 and str(folder) in str(warned[0].message)
    assert len(computed) == 4  # what is there is still read
    assert only_file(folder).name.startswith("256x256")  # neither half-written files nor locks stay


@pytest.mark.parametrize("below", [False, True], ids=["is a file", "lies below a file"])
def test_folder_that_cannot_be_made_means_no_caching_and_one_warning(
    below: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computed: list[torch.Size]
) -> None:
    (tmp_path / "file").write_text("years of work")
    folder = tmp_path / "file" / "bases" if below else tmp_path / "file"
    monkeypatch.setenv("PEFT_SVF_CACHE", str(folder))
    weight = random_weight(256, 256)
    with pytest.warns(UserWarning, match="cannot be stored in .*PEFT_SVF_CACHE") as warned:
        for _ in range(2):
            assert torch.equal(get(weight).vectors, singular_basis(weight).vectors.float())
    assert len(warned) == 1
    assert len(computed) == 2
    assert (tmp_path / "file").read_text() == "years of work"


def test_lock_that_fails_means_no_caching_and_one_warning(
    monkeypatch: pytest.MonkeyPatch, computed: list[torch.Size]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(cache.FileLock, "acquire", fail)
    with pytest.warns(UserWarning, match="No locks available") as warned:
        for seed in range(2):
            get(random_weight(256, 256, seed=seed))
    assert len(warned) == 1
    assert len(computed) == 2


def test_process_that_never_lets_go_of_the_lock_is_not_waited_for_forever(
    folder: Path, monkeypatch: pytest.MonkeyPatch, computed: list[torch.Size], recwarn: pytest.WarningsRecorder
) -> None:
    weight = random_weight(256, 256)
    get(weight)
    path = only_file(folder)
    path.unlink()
    monkeypatch.setattr(cache, "LOCK_SECONDS", 0.1)
    with cache.FileLock(folder / f".{path.stem}.lock"):
        get(weight)
    assert len(computed) == 2
    assert path.exists()
    assert not recwarn.list


PROCESS = """
import sys, time, types
from pathlib import Path
import torch

name, folder = sys.argv[1], Path(sys.argv[2])
package = sys.modules["peft_svf"] = types.ModuleType("peft_svf")  # without PEFT and transformers: seconds sooner
package.__path__ = [sys.argv[3]]
from peft_svf.spectrum import cache, cached_singular_basis, singular_basis, weight_sketch

def slow(weight):
    with (folder / "computed").open("a") as log:
        log.write(f"{name} {tuple(weight.shape)}\\n")
    time.sleep(1.0)
    return singular_basis(weight)

cache.singular_basis = slow
weight = torch.randn(300, 256, generator=torch.Generator().manual_seed(0))
sketch = weight_sketch(weight)
(folder / f"ready {name}").touch()
while not (folder / "go").exists():
    time.sleep(0.01)
basis = cached_singular_basis(weight, sketch, torch.float32)
print(float(basis.vectors.double().sum()), float(basis.singular_values[0]))
"""


def start(name: str, folder: Path) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", PROCESS, name, str(folder), str(Path(cache.__file__).parents[1])]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def test_two_processes_at_once_compute_once(tmp_path: Path, folder: Path) -> None:
    processes = {name: start(name, tmp_path) for name in ("first", "second")}
    for name, process in processes.items():
        wait_for(tmp_path / f"ready {name}", process)
    (tmp_path / "go").touch()
    printed = []
    for process in processes.values():
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        printed.append(output)
    assert len((tmp_path / "computed").read_text().splitlines()) == 1
    assert printed[0] == printed[1]
    assert only_file(folder).suffix == ".safetensors"  # no lock is left


def test_killed_process_leaves_the_cache_usable(tmp_path: Path, folder: Path, computed: list[torch.Size]) -> None:
    (tmp_path / "go").touch()
    process = start("first", tmp_path)
    wait_for(tmp_path / "computed", process)  # it holds the lock now
    process.kill()
    process.communicate()
    weight = torch.randn(300, 256, generator=torch.Generator().manual_seed(0))
    get(weight)
    get(weight)
    assert len(computed) == 1
    assert only_file(folder).suffix == ".safetensors"
