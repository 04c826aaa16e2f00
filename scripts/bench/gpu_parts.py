"""The parts of the GPU suite, and on which occasion each runs.

Budgets are reasoned, not measured: a process takes 5 s until torch is imported and the GPU is
there, the first one of a machine several times that; a kernel compiles in 1 to 2 s, a variant of
`_attend` in 3, and 14 at a time; a figure takes its 60 to 150 ms, and its case up to 2 s.
"""

import os
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

BENCH = Path(__file__).parent
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short"]
OPS = [*PYTEST, "--confcutdir=tests/ops", "tests/ops"]
"""The operations' tests, without what the other tests import."""
ON_GPU = ["-p", "lone_flash"]
"""FlashAttention is tested where the rest of vLLM is missing, too."""
WRITES = "test_any_precision_has_a_codec or test_tokens_of_all_layers or test_normalised_keys"
CHECKED = f"test_serving_shapes or {WRITES} or side_by_side or test_scores_match"
"""What the kernels that serve give; the other tests take minutes to compile theirs."""
SANITISED = f"{WRITES} or test_gather_gives"
"""Tests that write pages and blocks and read them back; the sanitizer is slow."""
DECODE_CHECKED = (
    "test_serving_shapes and decode or test_all_bit_pairs or test_long_context or unpacked"
)
"""Of decode attention what serves, all pairs of bits, and shares of one context."""
DECODE_DRY = "unpacked or halves"
DRY = "test_any_precision_has_a_codec"
GATE_WORKERS = 12
DENSE_IDENTITY = "tests/engine/test_dense_identity.py"
CUDA_GRAPHS = "tests/engine/test_cuda_graphs.py"


class Part(NamedTuple):
    """A command.

    Attributes:
        command: Run in the root of the repository.
        seconds: Its budget; what earlier parts left over comes on top.
        num_lines: Of its output, the last ones that the table shows.
        is_gate: Whether nothing is timed if it fails.
        is_timing: Whether it measures what a gate checks.
        needs_vllm: Whether it starts the engine.
        environment: Beside what all parts have.
    """

    command: list[str]
    seconds: int
    num_lines: int = 12
    is_gate: bool = False
    is_timing: bool = False
    needs_vllm: bool = False
    environment: dict[str, str] = {}


class Call(NamedTuple):
    """How the suite is called.

    Attributes:
        out: Where the parts write.
        is_dry: Whether it is a dry run.
        engine: More arguments of `vllm.LLM`, JSON.
    """

    out: Path
    is_dry: bool
    engine: str

    def program(self, name: str, part: str, *arguments: str) -> list[str]:
        """A program of this folder, which writes its rows to a file of the part's name."""
        command = [sys.executable, str(BENCH / f"{name}.py"), *arguments]
        return [*command, "--json", str(self.out / f"{part}.json"), *["--dry-run"] * self.is_dry]


Parts = dict[str, Part]


def in_parallel() -> list[str]:
    """Where pytest can, tests share out to as many processes as one GPU takes."""
    if find_spec("xdist") is None:
        return []
    return ["-n", str(min(GATE_WORKERS, os.cpu_count() or 1)), "--dist", "worksteal"]


def gate(call: Call, seconds: int) -> Part:
    if call.is_dry:
        return Part([*OPS, "-k", DRY], seconds, 3, is_gate=True)
    return Part([*OPS, *ON_GPU, *in_parallel(), "-k", CHECKED], seconds, 8, is_gate=True)


def first_look(call: Call) -> Parts:
    """A: what the card is, that the kernels are right, and where their time goes."""
    program = call.program
    return {
        "card": Part(program("gpu_card", "card"), 30, 6),
        "compile": Part(program("gpu_compile", "compile", "layer"), 45, 30),
        "gate": gate(call, 50),
        "decode": Part(program("gpu_decode", "decode"), 45, 12, is_timing=True),
        "counters": Part(program("gpu_counters", "counters"), 35, 8, is_timing=True),
        "profile": Part(program("gpu_profile", "profile"), 30, 36, is_timing=True),
    }


def tuning(call: Call) -> Parts:
    """B: the ways to launch decode attention, then fp8 and prefill; outputs are checked."""
    program = call.program
    return {
        "compile": Part(program("gpu_compile", "compile", "tuning"), 60, 8),
        "tuning": Part(program("gpu_tuning", "tuning"), 75, 24, is_timing=True),
        "fp8": Part(program("gpu_decode", "fp8", "--fp8"), 40, 14, is_timing=True),
        "prefill": Part(program("gpu_prefill", "prefill"), 60, 10, is_timing=True),
    }


def decode(call: Call) -> Parts:
    """Decode attention alone: whether it is right, then how it is launched best, in 100 s."""
    tests = [*OPS, *["-k", DECODE_DRY]]
    if not call.is_dry:
        tests = [*OPS, *ON_GPU, *in_parallel(), "-k", DECODE_CHECKED]
    tuned = [] if call.is_dry else ["--shapes", "28/4 x 64", "28/4 x 8"]
    return {
        "gate": Part(tests, 32, 8, is_gate=True),
        "compile": Part(call.program("gpu_compile", "compile", "tuning"), 22, 10),
        "tuning": Part(call.program("gpu_tuning", "tuning", *tuned), 42, 24, is_timing=True),
    }


def model(call: Call) -> Parts:
    """C: a decoder of a 7B model's shape, which checks itself first; decode, then prefill."""
    sizes = ["--prefill-tokens", "16384", "32768", "--repeats", "2"]
    options = ["--models", "LongVA-7B", "--ops", "decode", "prefill", *sizes]
    return {
        "compile": Part(call.program("gpu_compile", "compile", "model"), 45, 4),
        "model": Part(call.program("whole_model", "model", *options), 150, 14, is_timing=True),
    }


def checks(call: Call) -> Parts:
    """Every test of the operations, and their writes under the sanitizer."""
    tests = OPS + ([] if call.is_dry else ON_GPU + in_parallel())
    found = {"tests": Part([*tests, *["-k", DRY] * call.is_dry], 300, 12)}
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer and not call.is_dry:
        # Tensors out of one large allocation would hide what runs over their ends.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = [sanitizer, "--error-exitcode", "9", *OPS, *ON_GPU, "-k", SANITISED]
        found["sanitizer"] = Part(command, 240, 12, environment=alone)
    return found


def tables(call: Call) -> Parts:
    """One layer at all sizes against all that vLLM has, and both models."""
    found = {"gate": gate(call, 60)}
    for program, options in (("attention", ("--device", "cuda")), ("whole_model", ())):
        for name in ("LongVA-7B", "LLaVA-NeXT-7B"):
            part = f"{program}_{name}"
            command = call.program(program, part, *options, "--models", name)
            found[part] = Part(command, 420, 40, is_timing=True)
    return found


def engine(call: Call) -> Parts:
    """The real engine: its tests, then serving."""
    families = "llama" if call.is_dry else "llama or llava_next"
    tests = [*PYTEST, DENSE_IDENTITY, CUDA_GRAPHS, "-k", f"{families} or graph"]
    found = {"engine_tests": Part(tests, 420, 12, is_gate=True, needs_vllm=True)}
    for name in ("decode_step", "llava_next", "longva"):
        options = ("--device", "cuda", "--only", name, "--engine", call.engine)
        command = call.program("serving", f"engine_{name}", *options)
        found[f"engine_{name}"] = Part(command, 560, 16, is_timing=True, needs_vllm=True)
    return found


class Occasion(NamedTuple):
    """Parts that run back to back, all in so many seconds."""

    seconds: int
    parts: Callable[[Call], Parts]


OCCASIONS = {
    "A": Occasion(240, first_look),
    "B": Occasion(240, tuning),
    "C": Occasion(200, model),
    "decode": Occasion(100, decode),
    "checks": Occasion(570, checks),
    "tables": Occasion(570, tables),
    "engine": Occasion(570, engine),
}
