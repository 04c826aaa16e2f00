"""Serving figures of the zipvl backend beside stock vLLM and stock vLLM with an fp8 KV cache.

    python scripts/bench/serving.py --json OUT [--quick] [--only memory first_token ...]
    python scripts/bench/serving.py --json OUT --device cuda [--only llava_next ...]

Random weights: neither the tokens nor the choice of kept ones mean anything, so the share of
kept tokens is set by `ratio` and printed. All methods get the same bytes of KV memory.

- peak_running_requests, preemptions, output_tokens_per_second: requests of one picture and few
  words (LLaVA-NeXT), all submitted at once. "KV bytes" is stock's memory per token of context
  over the method's, reserve, tail and partly filled pages included, mean over the steps that
  only decode.
- time_to_first_token: one prompt at a time, in one chunk, median. Compression runs after the
  first token; the JSON has the time of the second beside it.
- scheduler_step_time: CPU time of `schedule` and `update_from_output`, median over decode steps.

On a GPU the models have the sizes of LLaVA-NeXT-7B and LongVA-7B, with CUDA graphs and asynchronous
scheduling, and the tokens after the first are timed too:

- time_per_output_token: mean gap after the second token, compressions of the tail included.
- *_loaded: of the requests submitted at once, medians; first tokens wait for memory.
- decode_step_time: of a batch that only decodes. Fails if zipvl makes the host wait for the GPU
  in it, or if it is not one CUDA graph.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import serving_engine
from serving_gpu import GpuEffort, decode_step, llava_next, longva
from serving_hosts import hosts
from serving_rows import Row, about, table
from serving_scenarios import FULL, QUICK, first_token, memory, scheduler_step

SCENARIOS = {
    "cpu": {"memory": memory, "first_token": first_token, "scheduler_step": scheduler_step},
    "cuda": {"decode_step": decode_step, "llava_next": llava_next, "longva": longva},
}
SCENARIO_HELP = "; ".join(f"{device}: {', '.join(names)}" for device, names in SCENARIOS.items())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="where the rows are written")
    parser.add_argument("--device", choices=SCENARIOS, default="cpu")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, fewer repetitions")
    parser.add_argument("--only", nargs="+", metavar="SCENARIO", help=SCENARIO_HELP)
    parser.add_argument(
        "--dry-run", action="store_true", help="of the GPU's code, on the CPU: no figures"
    )
    parser.add_argument(
        "--engine", type=json.loads, default={}, help="on a GPU: more arguments of vllm.LLM, JSON"
    )
    arguments = parser.parse_args()
    known = list(SCENARIOS[arguments.device])
    arguments.only = arguments.only or known
    if unknown := set(arguments.only) - set(known):
        parser.error(f"--only {' '.join(unknown)}: choose from {' '.join(known)}")
    is_cuda = arguments.device == "cuda"
    if is_cuda and arguments.quick or not is_cuda and (arguments.dry_run or arguments.engine):
        parser.error("--quick is for the CPU, --dry-run and --engine for --device cuda")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    is_cuda = arguments.device == "cuda"
    effort: Any = QUICK if arguments.quick else FULL
    log = {}
    if is_cuda:
        effort = GpuEffort(arguments.dry_run, arguments.engine)
        # Says which attention stock runs, and what is captured.
        log = {"VLLM_LOGGING_LEVEL": "INFO"}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, hosts(3, **log) as processes:
        header = about(processes[0].call(serving_engine.versions)) | {"quick": arguments.quick}
        if is_cuda:
            header["dry_run"] = arguments.dry_run
        if is_cuda and not arguments.dry_run and "gpu" not in header:
            raise SystemExit("there is no GPU; --dry-run goes through the code without one")
        print(", ".join(f"{key} {value}" for key, value in header.items()), flush=True)
        for name in arguments.only:
            for row in SCENARIOS[arguments.device][name](processes, Path(folder), effort):
                rows.append(row)
                text = json.dumps({"about": header, "rows": rows}, indent=1)
                arguments.json.write_text(text + "\n")
    rows.sort(key=lambda row: (row["shape"], row["op"]))
    print()
    print(table(rows))


if __name__ == "__main__":
    main()
