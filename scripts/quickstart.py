"""Run a small LLaVA with and without ZipVL, offline and as a server, and compare the KV cache.

The model has LLaVA-1.5's shape (576 tokens an image) but few, random weights: what it writes
means nothing, what its KV cache holds does.
"""

import base64
import contextlib
import gc
import io
import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import tiny_checkpoints
from PIL import Image, ImageDraw

FOLDER = Path(__file__).parents[1] / ".cache" / "quickstart"
LOOPBACK = "127.0.0.1"
MODEL = tiny_checkpoints.TinyCheckpoint("llava", layers=4, hidden_size=512, sharpen=1.0)
# Random weights attend almost uniformly, so a share of the attention mass (tau) would keep
# nearly every token. A fixed share of the tokens shows the mechanism instead.
RATIO = 0.4
BLOCK_SIZE = 32
NUM_IMAGES = 6
MAX_TOKENS = 48
SERVER_START_SECONDS = 300
QUESTION = "What is in the picture?"
ZIPVL = {"attention_backend": "zipvl", "additional_config": {"zipvl": {"ratio": RATIO}}}


class Sample(NamedTuple):
    """One value of vLLM's metrics, from a server or from an engine in this process."""

    name: str
    labels: dict[str, str]
    value: float


class Figures(NamedTuple):
    """What a run's metrics say about its KV cache."""

    num_requests: int
    prompt_tokens: float
    stock_blocks: float
    blocks: float
    kept_shares: list[float]


def say(text: str) -> None:
    print(f"[quickstart] {text}", flush=True)


def read_figures(samples: Iterable[Sample]) -> Figures:
    """Figures per request, from the counters of vLLM and of the plugin."""
    totals: dict[str, float] = {}
    shares: dict[int, float] = {}
    for name, labels, value in samples:
        if name == "vllm:zipvl_kept_share":
            shares[int(labels["layer"])] = value
        else:
            totals[name] = totals.get(name, 0.0) + value
    num_requests = int(totals["vllm:request_success"])
    prompt_tokens = totals["vllm:prompt_tokens"] / num_requests
    stock_blocks = math.ceil(prompt_tokens / BLOCK_SIZE)
    freed = totals.get("vllm:zipvl_blocks_freed", 0.0) - totals.get("vllm:zipvl_blocks_used", 0.0)
    return Figures(
        num_requests,
        prompt_tokens,
        stock_blocks,
        stock_blocks - freed / num_requests,
        [shares[layer] for layer in sorted(shares)],
    )


def find_or_make_model() -> Path:
    folder = FOLDER / f"tiny-llava-{tiny_checkpoints.key_of(MODEL)}"
    if folder.exists():
        say(f"using the random-weight LLaVA in {folder}")
        return folder
    say(f"making a random-weight LLaVA in {folder}")
    unfinished = FOLDER / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    tiny_checkpoints.make(MODEL, unfinished)
    unfinished.rename(folder)
    return folder


def draw_image(seed: int) -> Image.Image:
    generator = random.Random(seed)
    image = Image.linear_gradient("L").resize((336, 336)).convert("RGB")
    pen = ImageDraw.Draw(image)
    for _ in range(12):
        left, top = generator.randrange(300), generator.randrange(300)
        colour = tuple(generator.randrange(256) for _ in range(3))
        size = generator.randrange(20, 120)
        pen.ellipse((left, top, left + size, top + size), fill=colour)
    return image


def run_offline(model: Path, **settings: object) -> Figures:
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(model),
        block_size=BLOCK_SIZE,
        max_model_len=MODEL.max_position_embeddings,
        enforce_eager=True,
        disable_log_stats=False,
        **settings,
    )
    requests = [
        {
            "prompt": f"USER: <image>\n{QUESTION}\nASSISTANT:",
            "multi_modal_data": {"image": draw_image(seed)},
        }
        for seed in range(NUM_IMAGES)
    ]
    parameters = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    llm.generate(requests, parameters)
    figures = read_figures(
        Sample(metric.name, metric.labels, metric.value)
        for metric in llm.get_metrics()
        if hasattr(metric, "value")
    )
    del llm
    gc.collect()
    return figures


def run_server(model: Path) -> Figures:
    from openai import OpenAI
    from prometheus_client.parser import text_string_to_metric_families

    with serve(model) as address:
        say("asking the server about one picture")
        client = OpenAI(base_url=f"{address}/v1", api_key="none")
        client.chat.completions.create(
            model="tiny-llava",
            messages=[{"role": "user", "content": chat_content(draw_image(0))}],
            max_tokens=MAX_TOKENS,
            temperature=0.0,
            extra_body={"ignore_eos": True},
        )
        with urllib.request.urlopen(f"{address}/metrics") as answer:
            text = answer.read().decode()
    families = text_string_to_metric_families(text)
    samples = [sample for family in families for sample in family.samples]
    return read_figures(
        Sample(sample.name.removesuffix("_total"), sample.labels, sample.value)
        for sample in samples
    )


def chat_content(image: Image.Image) -> list[dict]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": QUESTION},
    ]


@contextlib.contextmanager
def serve(model: Path) -> Iterator[str]:
    """The address of a `vllm serve` that answers; it is stopped at the end of the block."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        port = listener.getsockname()[1]
    command = [
        *(str(Path(sys.executable).with_name("vllm")), "serve", str(model)),
        *("--attention-backend", ZIPVL["attention_backend"]),
        *("--additional-config", json.dumps(ZIPVL["additional_config"])),
        *("--served-model-name", "tiny-llava", "--enforce-eager"),
        *("--block-size", str(BLOCK_SIZE), "--host", LOOPBACK, "--port", str(port)),
    ]
    say(f"starting: vllm {' '.join(command[1:7])} ...")
    log = FOLDER / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"VLLM_LOGGING_LEVEL": "INFO"},
        )
    try:
        wait_until_healthy(server, f"http://{LOOPBACK}:{port}/health", log)
        for line in log.read_text(errors="replace").splitlines():
            if " zipvl: " in line:
                say(f"its log, {log.name}: {line[line.index('zipvl: ') :]}")
        yield f"http://{LOOPBACK}:{port}"
    finally:
        stop(server)


def wait_until_healthy(server: subprocess.Popen, url: str, log: Path) -> None:
    start = time.monotonic()
    next_report = 10
    while (seconds := time.monotonic() - start) < SERVER_START_SECONDS:
        if server.poll() is not None:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
            sys.exit(f"{tail}\nthe server ended with status {server.returncode}; see {log}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(url, timeout=5).close()
            say(f"the server is up after {seconds:.0f} s")
            return
        if seconds >= next_report:
            say(f"waiting for the server ({seconds:.0f} s)")
            next_report += 10
        time.sleep(0.5)
    sys.exit(f"the server was not up after {SERVER_START_SECONDS} s; see {log}")


def stop(server: subprocess.Popen) -> None:
    server.terminate()
    try:
        server.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, 9)
        server.wait()


def print_table(rows: dict[str, Figures]) -> None:
    layers = "".join(f"{f'layer {layer}':>9}" for layer in range(MODEL.layers))
    print()
    print(f"{'':22}{'requests':>9}{'prompt':>8}{'KV blocks':>11}   tokens kept at high precision")
    print(f"{'':22}{'':>9}{'tokens':>8}{'a request':>11}   {layers}")
    for name, row in rows.items():
        shares = "".join(f"{share:>9.1%}" for share in row.kept_shares) or "      all, uncompressed"
        counts = f"{row.num_requests:>9}{row.prompt_tokens:>8.0f}{row.blocks:>11.1f}"
        print(f"{name:22}{counts}   {shares}")
    compressed = rows["LLM, zipvl"]
    print()
    print(f"A block holds {BLOCK_SIZE} tokens of all {MODEL.layers} layers uncompressed.")
    print(
        f"With zipvl a request holds {compressed.stock_blocks / compressed.blocks:.1f} times fewer "
        "KV blocks once its prompt is compressed."
    )
    print(
        f"The weights are random. ratio={RATIO} was set (the newest tokens of the prompt are kept "
        "in any case),\nbecause the default, tau=0.975 of the attention mass, keeps nearly every "
        "token of a model\nthat attends to all of them alike."
    )


def main() -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), LOOPBACK)))
    model = find_or_make_model()
    rows = {}
    say(f"stock vLLM: {NUM_IMAGES} requests of one picture each")
    rows["LLM, stock"] = run_offline(model)
    say(f"zipvl: the same requests, with {json.dumps(ZIPVL['additional_config'])}")
    rows["LLM, zipvl"] = run_offline(model, **ZIPVL)
    rows["vllm serve, zipvl"] = run_server(model)
    print_table(rows)


if __name__ == "__main__":
    main()
