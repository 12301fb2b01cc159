"""Run PEFT's own tests with SVF: `make test-upstream`, or `make test-upstream-fast` for the part that CI runs.

The tests come from the source distribution of the installed PEFT (source.py), the models that they load are made
locally (tiny_hub.py), what they are run with stands in cases.py, and a pytest plugin puts it together (plugin.py).
The exit status is not 0 if a test failed or if fewer tests ran than must. If the package index cannot be reached, the
fast part is skipped with a message, so that continuous integration works without network.
PEFT_DEBUG_WITH_TORCH_COMPILE=1 adds PEFT's tests of torch.compile, which take minutes each.

    python tests/upstream/run.py [--fast] [--workers 2] [pytest's own arguments, for instance tests/test_config.py -x]
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

from source import DownloadError, fetch_peft_tests


HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "upstream"
MINIMUM, FAST_MINIMUM = 800, 300


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="only the part that continuous integration runs")
    parser.add_argument("--workers", type=int, default=0, help="number of processes (default: this one)")
    options, pytest_arguments = parser.parse_known_args(arguments)
    try:
        root = fetch_peft_tests(BUILD)
    except DownloadError as error:
        sys.stderr.write(f"{'SKIPPED' if options.fast else 'FAILED'}: PEFT's own tests, {error}\n")
        return 0 if options.fast else 1
    environment = os.environ | {
        "HF_HOME": str(_tiny_hub()),
        "HF_HUB_OFFLINE": "1",
        "PEFT_SVF_CACHE": "off",
        "OMP_NUM_THREADS": "1",  # several workers share the processor, and the models are tiny
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), str(HERE), os.environ.get("PYTHONPATH")])),
    }
    command = _pytest_command(root, options.fast, options.workers, pytest_arguments)
    return subprocess.run(command, cwd=root, env=environment).returncode


def _tiny_hub() -> Path:
    """The folder of the tiny models, made once for each version of the file that makes them and of its tools."""
    program = HERE / "tiny_hub.py"
    recipe = program.read_text() + "".join(importlib.metadata.version(name) for name in ("torch", "transformers"))
    home = BUILD / f"hub-{hashlib.sha1(recipe.encode()).hexdigest()[:12]}"
    if not home.is_dir():
        subprocess.run([sys.executable, str(program), str(home)], check=True)
    return home


def _pytest_command(root: Path, fast: bool, workers: int, arguments: list[str]) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), "--rootdir", str(root), "-p", "plugin"]
    command += ["--quiet", "-n", str(workers)]
    if fast:
        command.append("--fast")
    if not arguments:
        command += ["--minimum", str(FAST_MINIMUM if fast else MINIMUM)]
    return [*command, *(arguments or ["tests"])]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
