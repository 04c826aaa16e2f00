"""Attention of one layer against the stock kernels: prefill, decode and compression.

    python scripts/bench/attention.py --device cpu --json OUT

Inputs are random, so the kept share is set, not found. Stock and ours run in the same process;
figures are medians. A ratio above 1 is better than stock. Every operation is checked against its
reference first, and nothing is printed for one that fails.
"""

import argparse
import json
from datetime import date
from importlib import import_module
from pathlib import Path

import torch
from aligned_table import aligned
from attention_cases import DTYPE
from attention_rows import HEADING, cells, line

OPS = ("prefill", "decode", "compress")
MODULES = {"cpu": "attention_cpu", "cuda": "attention_gpu"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=MODULES, default="cpu")
    parser.add_argument("--json", type=Path, required=True, help="where the rows are written")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--models", nargs="+", help="on a GPU: whose layers; all without it")
    parser.add_argument("--repeats", type=int, default=7, help="on the CPU")
    parser.add_argument(
        "--dry-run", action="store_true", help="of the GPU's code, on the CPU: no figures"
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown too")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    module = import_module(MODULES[arguments.device])
    if arguments.device == "cuda":
        rows_of = module.measure(arguments.ops, arguments.dry_run, arguments.models)
    else:
        rows_of = module.measure(arguments.ops, arguments.repeats)
    about = {
        "date": date.today().isoformat(),
        "device": arguments.device,
        "torch": torch.__version__,
        "dtype": str(DTYPE),
        **module.about(),
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()), end="\n\n")
    print(line(HEADING))
    rows = []
    for found in rows_of:
        print(line(cells(found)), flush=True)
        rows.append(found)
        # What is measured stays, if the rest is interrupted.
        arguments.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    if arguments.markdown:
        print("\n" + aligned([HEADING, *map(cells, rows)], markdown=True))


if __name__ == "__main__":
    main()
