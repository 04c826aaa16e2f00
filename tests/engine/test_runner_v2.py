"""What vLLM uses on GPUs, under Triton's interpreter: model runner V2 and the Triton kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

from engines import draw_image, generate, prompt, words
from zipvl_engine import LOSSY, zipvl_engine

TESTS = Path(__file__).parents[1]
ZIPVL = {**LOSSY, "min_tokens": 64}
SETTINGS = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_batched_tokens": 96,
    "max_num_seqs": 4,
    "num_gpu_blocks_override": 64,
}
WORDS = words(0, 150)
QUESTION = "what is it"
MAX_TOKENS = 40

PROGRAM = """
import json, sys
from engines import draw_image, generate, prompt
from vllm_zipvl.backend.worker import ZipVLWorker
from zipvl_engine import assert_counted_whole, zipvl_engine

model, zipvl, settings, words, question, max_tokens = json.loads(sys.argv[1])
requests = [words, prompt(question, draw_image())]
chunks_of_rows, told = ZipVLWorker.chunks_of_rows, []

def noting_chunks_of_rows(worker, last_blocks):
    told.append(worker._request_ids is not None)
    return chunks_of_rows(worker, last_blocks)

ZipVLWorker.chunks_of_rows = noting_chunks_of_rows
with zipvl_engine(model, zipvl, **settings) as llm:
    assert llm.llm_engine.vllm_config.use_v2_model_runner
    tokens = generate(llm, requests, max_tokens)
    assert_counted_whole(llm)
assert told and all(told), "a step with prompts had to ask whose the rows are"
for operation in ("decode_attention", "dense_blocks", "page_codec", "prefill_attention",
                  "probe_scores", "tail_scores"):
    assert f"vllm_zipvl.ops.{operation}.triton" in sys.modules, operation
print("tokens", json.dumps(tokens))
"""


def test_same_tokens_as_runner_v1_and_the_cpu_kernels(checkpoint):
    model = checkpoint("llava", dtype="float32", image_size=112)
    with zipvl_engine(model, ZIPVL, **SETTINGS) as llm:
        assert not llm.llm_engine.vllm_config.use_v2_model_runner
        expected = generate(llm, [WORDS, prompt(QUESTION, draw_image())], MAX_TOKENS)
    arguments = json.dumps([str(model), ZIPVL, SETTINGS, WORDS, QUESTION, MAX_TOKENS])
    paths = [TESTS / "interpreted_triton", TESTS / "engine"]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
    command = [sys.executable, "-c", PROGRAM, arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("tokens ")]
    assert json.loads(line.removeprefix("tokens ")) == expected
