"""Everything that needs a GPU: a few checks first, then timings, then all checks.

    python scripts/bench/gpu_suite.py --out DIR [--vllm DIR] [--only PART ...]
    python scripts/bench/gpu_suite.py --out DIR --dry-run   # the same on a CPU, interpreted

DIR/suite.zip gets a log per part, the benchmarks' JSON, and suite.json: what ran, how it ended, how
long it took. It is written anew after each part, and all end in `--seconds`; what is left runs in a
further call with `--only`. A part that fails does not stop those after it, except that nothing is
timed if the first checks fail. The tests draw other inputs in every call, from a seed that is
printed. Parts with the real engine are left out where there is no vLLM; neither it nor this package
need be installed: `--vllm` names a folder that CUDA wheels of vLLM and of what it imports were
extracted into.
"""

import argparse
import configparser
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

BENCH = Path(__file__).parent
ROOT = BENCH.parents[1]
WRITES = "test_any_precision_has_a_codec or test_tokens_of_all_layers or test_normalised_keys"
CHECKED = f"{WRITES} or side_by_side or test_scores_match"
"""What the kernels that serve give; the other tests take minutes to compile theirs."""
SANITISED = f"{WRITES} or test_gather_gives"
"""Tests that write pages and blocks and read them back; the sanitizer is slow."""
DRY = "test_any_precision_has_a_codec"
GATE = "checks"
DENSE_IDENTITY = "tests/engine/test_dense_identity.py"
CUDA_GRAPHS = "tests/engine/test_cuda_graphs.py"
FAMILIES = "llama or llava_next"


class Part(NamedTuple):
    """A command.

    Attributes:
        command: Run in the root of the repository.
        is_timing: Whether it measures what the tests check.
        needs_vllm: Whether it starts the engine.
        seconds: It ends after so many, except in a dry run.
        environment: Beside what all parts have.
    """

    command: list[str]
    is_timing: bool = False
    needs_vllm: bool = False
    seconds: int = 420
    environment: dict[str, str] = {}


def parts(out: Path, is_dry: bool, engine: str) -> dict[str, Part]:
    """What runs, in this order."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider"]
    tests = [*pytest, "tests/ops"]
    found = {} if is_dry else {"gpu": Part(["nvidia-smi"])}
    found[GATE] = Part([*tests, "-k", DRY if is_dry else CHECKED])

    def benchmark(program: str, name: str, *options: str) -> list[str]:
        command = [python, str(BENCH / program), "--device", "cuda", *options]
        return [*command, "--json", str(out / f"{name}.json"), *(["--dry-run"] * is_dry)]

    families = "llama" if is_dry else FAMILIES
    engine_tests = [*pytest, DENSE_IDENTITY, CUDA_GRAPHS, "-k", f"{families} or graph"]
    found["engine_tests"] = Part(engine_tests, needs_vllm=True)
    found["attention"] = Part(benchmark("attention.py", "attention"), is_timing=True)
    for model in ("LongVA-7B", "LLaVA-NeXT-7B"):
        name = f"whole_model_{model}"
        command = benchmark("whole_model.py", name, "--models", model)
        found[name] = Part(command, is_timing=True)
    for name in ("decode_step", "llava_next", "longva"):
        options = ("--only", name, "--engine", engine)
        command = benchmark("serving.py", f"engine_{name}", *options)
        found[f"engine_{name}"] = Part(command, is_timing=True, needs_vllm=True, seconds=560)
    if not is_dry:
        found["tests"] = Part(tests, seconds=560)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer and not is_dry:
        # Tensors out of one large allocation would hide what runs over their ends.
        command = [sanitizer, "--error-exitcode", "9", *tests, "-k", SANITISED]
        found["sanitizer"] = Part(command, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    return found


def write_metadata(folder: Path) -> None:
    """What pip would write of this package: vLLM finds plugins by it, and the package its range."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    about, extras = setup["metadata"], setup["options.extras_require"]
    lines = ["Metadata-Version: 2.1", f"Name: {about['name']}", f"Version: {about['version']}"]
    always = setup["options"]["install_requires"].split()
    lines += [f"Requires-Dist: {requirement}" for requirement in always]
    for extra in extras:
        lines.append(f"Provides-Extra: {extra}")
        named = extras[extra].split()
        lines += [f'Requires-Dist: {requirement}; extra == "{extra}"' for requirement in named]
    name = f"{about['name'].replace('-', '_')}-{about['version']}.dist-info"
    entry_points = configparser.ConfigParser(delimiters=("=",))
    for group, text in setup["options.entry_points"].items():
        entry_points.read_string(f"[{group}]{text}\n")
    info = folder / name
    info.mkdir()
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    with (info / "entry_points.txt").open("w") as file:
        entry_points.write(file)


def environment(metadata: Path, vllm: Path | None) -> dict[str, str]:
    paths = [str(metadata), str(ROOT), *([str(vllm.resolve())] if vllm else [])]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return os.environ | offline | {"PYTHONPATH": os.pathsep.join(paths)}


def run(
    name: str, part: Part, out: Path, environment: dict[str, str], is_dry: bool, seconds: float
) -> dict[str, object]:
    """One part; its output goes to a log, the end of which is printed."""
    print(f"== {name}: {' '.join(part.command)}", flush=True)
    if not is_dry:
        environment = environment | {"ZIPVL_TEST_DEVICE": "cuda"}
    elif not part.needs_vllm:
        environment = environment | {"TRITON_INTERPRET": "1"}
    # Stock attends to float32 by Triton's default precision, which must be that of the plugin.
    environment = environment | {"TRITON_F32_DEFAULT": "ieee"} | part.environment
    log, started = out / f"{name}.log", time.monotonic()
    with (
        log.open("w") as file,
        subprocess.Popen(
            part.command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment,
            process_group=0,
        ) as process,
    ):  # fmt: skip
        try:
            status = process.wait(None if is_dry else min(seconds, part.seconds))
        except subprocess.TimeoutExpired:
            # With its workers, which would hold the GPU's memory.
            os.killpg(process.pid, signal.SIGKILL)
            status = None
    seconds = round(time.monotonic() - started, 1)
    print("\n".join(log.read_text(errors="replace").splitlines()[-25:]))
    return {"command": part.command, "status": status, "seconds": seconds}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vllm", type=Path, metavar="DIR", help="extracted CUDA vLLM")
    parser.add_argument("--only", nargs="+", metavar="PART")
    parser.add_argument("--engine", default="{}", help="more arguments of vllm.LLM, JSON")
    parser.add_argument("--seconds", type=float, default=570, help="of all parts together")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    if arguments.vllm and not (arguments.vllm / "vllm").is_dir():
        parser.error(f"--vllm {arguments.vllm}: there is no vllm in it")
    return arguments


def chosen(arguments: argparse.Namespace, out: Path) -> dict[str, Part]:
    """The parts that are asked for, or all that can run."""
    found = parts(out, arguments.dry_run, arguments.engine)
    if arguments.only is None:
        has_vllm = arguments.vllm is not None or importlib.util.find_spec("vllm") is not None
        return {name: part for name, part in found.items() if has_vllm or not part.needs_vllm}
    if unknown := set(arguments.only) - set(found):
        raise SystemExit(f"--only {' '.join(unknown)}: choose from {' '.join(found)}")
    return {name: part for name, part in found.items() if name in arguments.only}


def main() -> None:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + arguments.seconds
    found: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as metadata, tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        write_metadata(Path(metadata))
        variables = environment(Path(metadata), arguments.vllm)
        seed = variables.setdefault("ZIPVL_TEST_SEED", str(random.randrange(1000)))
        print(f"== ZIPVL_TEST_SEED={seed}")
        for name, part in chosen(arguments, out).items():
            if part.is_timing and found.get(GATE, {}).get("status", 0) != 0:
                print(f"== {name}: not timed, since the checks failed")
                continue
            left = end - time.monotonic()
            if left <= 0 and not arguments.dry_run:
                print(f"== {name}: no time left; run it with --only {name}")
                continue
            found[name] = run(name, part, out, variables, arguments.dry_run, left)
            results = {"seed": seed, "parts": found}
            (out / "suite.json").write_text(json.dumps(results, indent=1) + "\n")
            shutil.make_archive(str(arguments.out / "suite"), "zip", out)
    print({name: part["status"] for name, part in found.items()})
    failed = [name for name, part in found.items() if part["status"] != 0]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
