"""What a part of the GPU suite finds around it."""

import configparser
import os
from pathlib import Path

ROOT, BENCH = Path(__file__).parents[2], Path(__file__).parent


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
    """What all parts have; neither this package nor vLLM need be installed."""
    paths = [str(metadata), str(ROOT), str(BENCH), *([str(vllm.resolve())] if vllm else [])]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    found = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # Stock attends to float32 by Triton's default precision, which must be that of the plugin.
        "TRITON_F32_DEFAULT": "ieee",
    }
    return os.environ | found
