"""The real server, asked through the OpenAI client; bad input leaves it up."""

import base64
import io
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from engines import draw_image, environment

ZIPVL = '{"zipvl": {"ratio": 0.4, "low_bits": 2, "min_tokens": 256}}'
START_SECONDS = 400


def serve(model: Path, *arguments: str) -> list[str]:
    vllm = str(Path(sys.executable).with_name("vllm"))
    return [vllm, "serve", str(model), "--attention-backend", "zipvl", *arguments]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """Address and log of a running server."""
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    command = serve(
        checkpoint("llava"), "--additional-config", ZIPVL, "--enforce-eager", "--port", str(port),
        "--block-size", "32", "--max-model-len", "1024", "--served-model-name", "tiny",
        "--host", "127.0.0.1", "--num-gpu-blocks-override", "256",
    )  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env={**os.environ, **environment("all")}
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, process, log)
        yield address, log
    finally:
        process.terminate()
        process.wait(60)


def wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(START_SECONDS):
        if process.poll() is not None:
            raise AssertionError(log.read_text()[-3000:])
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5)
            return
        except OSError:
            time.sleep(1)
    raise AssertionError("the server did not start")


def ask(address: str, image: bytes, text: str = "What is it?") -> str:
    url = "data:image/png;base64," + base64.b64encode(image).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": text},
    ]
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": content}],
        max_tokens=24,
        extra_body={"ignore_eos": True},
    )
    return answer.choices[0].message.content or ""


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    draw_image(seed).save(buffer, "PNG")
    return buffer.getvalue()


def metric(address: str, name: str) -> float:
    text = urllib.request.urlopen(f"{address}/metrics", timeout=10).read().decode()
    lines = [line for line in text.splitlines() if line.startswith(f"vllm:{name}{{")]
    assert lines, f"{name} is not on /metrics"
    return float(lines[0].split()[-1])


def test_what_is_active_is_logged_once(server):
    _, log = server
    assert log.read_text().count("zipvl: ratio 0.4, sparse prefill from 256 tokens") == 1


def test_an_image_is_answered_and_counted(server):
    address, _ = server
    counter = "zipvl_prompts_compressed_total"
    before = metric(address, counter)
    assert ask(address, png(0))
    assert metric(address, counter) == before + 1
    assert metric(address, "zipvl_blocks_freed_total") > metric(address, "zipvl_blocks_used_total")
    assert 0.4 <= metric(address, "zipvl_kept_share") < 0.55


def test_bad_input_is_refused_and_the_next_request_answered(server):
    address, _ = server
    with pytest.raises(openai.BadRequestError):
        ask(address, b"this is no picture")
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        ask(address, png(1), "long " * 2000)
    assert ask(address, png(1))
    assert metric(address, "kv_cache_usage_perc") == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"zipvl": {"taau": 0.9}}', "zipvl.taau = 0.9 is not a setting"),
        ('{"zipvl": {"low_bits": 3}}', "zipvl.low_bits = 3 must be one of"),
    ],
)
def test_a_wrong_setting_stops_the_start(checkpoint, config, message):
    command = serve(checkpoint("llama"), "--additional-config", config)
    run = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment("all")}
    )
    assert run.returncode != 0
    (line,) = {line.strip() for line in run.stderr.splitlines() if "Value error" in line}
    assert message in line
