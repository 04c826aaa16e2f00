"""Ask a small trained LLaVA about pictures with and without ZipVL, offline and as a server.

The model is the accuracy lab's (scripts/lab/model): it answers questions about drawn pictures, here
four at a time.
"""

import base64
import contextlib
import gc
import io
import json
import math
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

sys.path.append(str(Path(__file__).parent / "lab"))
import tasks
from examples import Example, Question

MODEL = Path(__file__).parent / "lab" / "model"
FOLDER = Path(__file__).parents[1] / ".cache" / "quickstart"
LOOPBACK = "127.0.0.1"
SIDE = 168
BLOCK_SIZE = 32
NUM_EXAMPLES = 4
MAX_MODEL_LEN = 1024
MAX_TOKENS = 12
SERVER_START_SECONDS = 300
SETTINGS = {"zipvl": {"min_tokens": 512, "low_bits": 2}}
"""By default prompts as short as these prefill densely, and all tokens have 4 bits."""


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
    # Requests of one word end before their prompt is compressed.
    num_compressed = totals.get("vllm:zipvl_prompts_compressed", 0.0)
    return Figures(
        num_requests,
        prompt_tokens,
        stock_blocks,
        stock_blocks - freed / max(1.0, num_compressed),
        [shares[layer] for layer in sorted(shares)],
    )


def draw_examples() -> list[Example]:
    """Of the test set: the model has not seen them. Their pictures go to files to look at.

    Each with one short question and one whose answer is a list, read from the compressed cache.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    examples = []
    for index in range(NUM_EXAMPLES):
        drawn = tasks.example("frames", "hard", "test", index, SIDE, num_questions=8)
        by_length = sorted(drawn.questions, key=lambda question: len(question.answer))
        examples.append(drawn._replace(questions=[by_length[0], by_length[-1]]))
        sheet = Image.new("RGB", (len(drawn.images) * SIDE, SIDE))
        for place, image in enumerate(drawn.images):
            sheet.paste(image, (place * SIDE, 0))
        sheet.save(FOLDER / f"pictures-{index}.png")
    return examples


def run_offline(examples: list[Example], **settings: object) -> tuple[list[str], Figures]:
    """The answers to all questions, and what the KV cache held."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(MODEL),
        block_size=BLOCK_SIZE,
        max_model_len=MAX_MODEL_LEN,
        enforce_eager=True,
        disable_log_stats=False,
        **settings,
    )
    conversations = [
        [{"role": "user", "content": [*pictures, text_part(question)]}]
        for example in examples
        for pictures in [[{"type": "image_pil", "image_pil": image} for image in example.images]]
        for question in example.questions
    ]
    outputs = llm.chat(conversations, SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS))
    figures = read_figures(
        Sample(metric.name, metric.labels, metric.value)
        for metric in llm.get_metrics()
        if hasattr(metric, "value")
    )
    del llm
    gc.collect()
    return [output.outputs[0].text.strip() for output in outputs], figures


def text_part(question: Question) -> dict[str, str]:
    return {"type": "text", "text": question.text}


def run_server(example: Example) -> tuple[list[str], Figures]:
    """As `run_offline`, of one example, through the OpenAI client."""
    from openai import OpenAI
    from prometheus_client.parser import text_string_to_metric_families

    answers = []
    with serve() as address:
        say("asking the server about the first pictures")
        client = OpenAI(base_url=f"{address}/v1", api_key="none")
        pictures = [image_part(image) for image in example.images]
        for question in example.questions:
            reply = client.chat.completions.create(
                model=MODEL.name,
                messages=[{"role": "user", "content": [*pictures, text_part(question)]}],
                max_tokens=MAX_TOKENS,
                temperature=0.0,
            )
            answers.append(reply.choices[0].message.content.strip())
        with urllib.request.urlopen(f"{address}/metrics") as answer:
            text = answer.read().decode()
    families = text_string_to_metric_families(text)
    samples = [sample for family in families for sample in family.samples]
    figures = read_figures(
        Sample(sample.name.removesuffix("_total"), sample.labels, sample.value)
        for sample in samples
    )
    return answers, figures


def image_part(image: Image.Image) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


@contextlib.contextmanager
def serve() -> Iterator[str]:
    """The address of a `vllm serve` that answers; it is stopped at the end of the block."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        port = listener.getsockname()[1]
    command = [
        *(str(Path(sys.executable).with_name("vllm")), "serve", str(MODEL)),
        *("--attention-backend", "zipvl", "--additional-config", json.dumps(SETTINGS)),
        *("--served-model-name", MODEL.name, "--enforce-eager"),
        *("--block-size", str(BLOCK_SIZE), "--max-model-len", str(MAX_MODEL_LEN)),
        *("--host", LOOPBACK, "--port", str(port)),
    ]
    say(
        "starting: vllm serve scripts/lab/model --attention-backend zipvl "
        f"--additional-config '{json.dumps(SETTINGS)}'"
    )
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


def print_answers(examples: list[Example], answers: dict[str, list[str]]) -> None:
    questions = [
        (i, question) for i, example in enumerate(examples) for question in example.questions
    ]
    for row, (i, question) in enumerate(questions):
        print(f"\npictures-{i}.png: {question.text}?")
        print(f"    {'right answer':16}{question.answer}")
        for name, given in answers.items():
            if row < len(given):
                print(f"    {name:16}{given[row]}")


def print_figures(rows: dict[str, Figures]) -> None:
    num_layers = len(rows["LLM, zipvl"].kept_shares)
    layers = "".join(f"{f'layer {layer}':>9}" for layer in range(num_layers))
    print()
    print(f"{'':22}{'requests':>9}{'prompt':>8}{'KV blocks':>11}   tokens kept at high precision")
    print(f"{'':22}{'':>9}{'tokens':>8}{'a request':>11}   {layers}")
    for name, row in rows.items():
        shares = "".join(f"{share:>9.1%}" for share in row.kept_shares) or "      all, uncompressed"
        counts = f"{row.num_requests:>9}{row.prompt_tokens:>8.0f}{row.blocks:>11.1f}"
        print(f"{name:22}{counts}   {shares}")
    compressed = rows["LLM, zipvl"]
    print()
    print(f"A block holds {BLOCK_SIZE} tokens of all {num_layers} layers uncompressed.")
    print(
        f"With zipvl a request holds {compressed.stock_blocks / compressed.blocks:.1f} times fewer "
        f"KV blocks once its prompt is compressed.\nThe pictures: {FOLDER}/pictures-*.png"
    )


def main() -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), LOOPBACK)))
    examples = draw_examples()
    answers, figures = {}, {}
    say(f"stock vLLM: two questions about each of {NUM_EXAMPLES} times four pictures")
    answers["stock"], figures["LLM, stock"] = run_offline(examples)
    say(f"zipvl, with {SETTINGS['zipvl']}: the same questions")
    chosen = {"attention_backend": "zipvl", "additional_config": SETTINGS}
    answers["zipvl"], figures["LLM, zipvl"] = run_offline(examples, **chosen)
    answers["zipvl, served"], figures["vllm serve, zipvl"] = run_server(examples[0])
    print_answers(examples, answers)
    print_figures(figures)


if __name__ == "__main__":
    main()
