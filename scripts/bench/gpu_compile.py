"""Compiles what an occasion times, in as many processes as there are processors.

    python scripts/bench/gpu_compile.py layer --json OUT
    TRITON_INTERPRET=1 python scripts/bench/gpu_compile.py layer --json OUT --dry-run

Prints registers, spills and shared memory of each kernel; later processes find the kernels in
Triton's cache. Interpreted kernels are not compiled: a dry run only makes the calls.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, NamedTuple

import lone_flash
import torch
from gpu_compile_cases import GROUPS
from gpu_program import begin, device_of, parser_of
from triton.runtime.jit import JITFunction

SPARED_PROCESSORS = 2


class Kernel(NamedTuple):
    """What a compiler made of a kernel; the first three are not known where it was not loaded."""

    name: str
    registers: int | None
    spills: int | None
    shared_bytes: int
    num_warps: int
    num_stages: int
    seconds: float


def _kernel(compiled: Any, seconds: float) -> Kernel:
    about = compiled.metadata
    return Kernel(
        about.name, getattr(compiled, "n_regs", None), getattr(compiled, "n_spills", None),
        about.shared, about.num_warps, about.num_stages, round(seconds, 2),
    )  # fmt: skip


@contextmanager
def noted() -> Iterator[dict[str, Kernel]]:
    """By hash, the kernels that are launched while the block runs."""
    found: dict[str, Kernel] = {}
    run = JITFunction.run

    def noting_run(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        started = time.monotonic()
        compiled = run(self, *args, **kwargs)
        if compiled is not None and compiled.hash not in found:
            found[compiled.hash] = _kernel(compiled, time.monotonic() - started)
        return compiled

    JITFunction.run = noting_run
    try:
        yield found
    finally:
        JITFunction.run = run


def compile_case(group: str, name: str, is_dry: bool) -> dict[str, Kernel]:
    """Run a case and wait for it; what it launched, by hash."""
    device = device_of(is_dry)
    torch.set_default_device(device)
    with noted() as found:
        GROUPS[group](is_dry)[name](is_dry)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return found


def _outcome(compiled: Callable[[], dict[str, Kernel]]) -> dict[str, Kernel] | str:
    """What a case launched, or what stopped it: the others do not depend on it."""
    try:
        return compiled()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def outcomes(group: str, is_dry: bool) -> Iterable[tuple[str, dict[str, Kernel] | str]]:
    """Of each case, as they end."""
    names = list(GROUPS[group](is_dry))
    if is_dry:
        for name in names:
            yield name, _outcome(lambda name=name: compile_case(group, name, is_dry))
        return
    workers = min(len(names), max(1, (os.cpu_count() or 1) - SPARED_PROCESSORS))
    with ProcessPoolExecutor(workers, get_context("spawn"), lone_flash.find) as pool:
        futures: dict[Future[dict[str, Kernel]], str] = {
            pool.submit(compile_case, group, name, is_dry): name for name in names
        }
        for future in as_completed(futures):
            yield futures[future], _outcome(future.result)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("group", choices=GROUPS)
    arguments = parser.parse_args()
    report = begin(arguments)
    started = time.monotonic()
    known: set[str] = set()
    num_failed = 0
    for case, found in outcomes(arguments.group, arguments.dry_run):
        if isinstance(found, str):
            num_failed += 1
            report.add(f"{case}: {found}"[:120], case=case, error=found)
            continue
        for key, kernel in found.items():
            # Variants of a launch are many; what spills is worth a line of each.
            is_shown = key not in known and (arguments.group == "layer" or bool(kernel.spills))
            known.add(key)
            report.add(_line(case, kernel) if is_shown else None, case=case, **kernel._asdict())
    seconds = time.monotonic() - started
    print(f"{len(known)} kernels in {seconds:.0f} s; {num_failed} cases failed")
    raise SystemExit(1 if num_failed else 0)


def _line(case: str, kernel: Kernel) -> str:
    return (
        f"{kernel.name:<15} {kernel.registers} registers, {kernel.spills} spilled, "
        f"{kernel.shared_bytes / 1024:.0f} KiB, {kernel.num_warps} warps, "
        f"{kernel.seconds:.1f} s ({case})"
    )


if __name__ == "__main__":
    main()
