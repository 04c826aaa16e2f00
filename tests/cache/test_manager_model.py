"""Random schedules against vLLM's own scheduler; what must hold is in `pretend_engine`."""

from collections import Counter
from dataclasses import dataclass

from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from pretend_engine import MAX_MODEL_LEN, Base, Case, PretendEngine

MIN_TOKENS = 48
BITS = [(16, 16), (4, 2), (4, 0), (8, 4)]
PHASES = ["waiting", "prefilling", "awaiting compression", "awaiting report", "decoding"]
# What the schedules must have met; a test that never gets there proves nothing.
RACES = {
    *(f"aborted {phase}" for phase in PHASES),
    *(f"preempted {phase}" for phase in PHASES[1:]),
    "prefix hit",
    "prefix hit beyond the prompt",
    "prompt compressed",
    "ran out of memory",
    "report of a freed request",
    "reserve left over",
    "reserve used up",
    "reset",
    "slot reused",
    "sparse blocks found, alike",
    "tail compressed",
    "waited for a report",
}

SETTINGS = st.builds(
    lambda bits, halves, **rest: {
        "high_bits": bits[0],
        "low_bits": bits[1],
        "compress": halves[0],
        "sparse_prefill": halves[1],
        **rest,
    },
    bits=st.sampled_from(BITS),
    # Compression and sparse prefill; without either there is nothing to do.
    halves=st.sampled_from([(True, True), (True, False), (True, True), (False, True)]),
    min_tokens=st.just(MIN_TOKENS),
    max_kept=st.sampled_from([1.0, 0.3]),
    residual=st.sampled_from([0, 32]),
    interval=st.sampled_from([16, 128]),
    # A head of one block or of none, or of several.
    sinks=st.sampled_from([4, 0, 40]),
    prefix_sharing=st.sampled_from(["alike", "approximate", "exact"]),
)
CASES = st.builds(
    Case,
    zipvl=SETTINGS,
    block_size=st.sampled_from([16, 32]),
    spare_blocks=st.sampled_from([0, 1, 3, 12]),
    max_num_seqs=st.sampled_from([4, 6, 2, 1]),
    is_async=st.booleans(),
    is_v2=st.booleans(),
    report_lag=st.sampled_from([0, 1]),
    by_priority=st.sampled_from([False, False, True]),
)
# Lengths around a block, the residual, `min_tokens`, and anything else that leaves room.
LENGTHS = st.sampled_from([1, 16, 17, 31, 32, 33, 64, 65]) | st.integers(1, MAX_MODEL_LEN - 8)


@dataclass(frozen=True)
class Prompt:
    """Prompts begin like their document; two of the same length without an end are equal."""

    document: int
    num_shared: int
    num_own: int
    max_tokens: int
    prompt_logprobs: bool

    def tokens(self, own: int) -> list[int]:
        shared = [10 + (self.document + i) % 10 for i in range(self.num_shared)]
        return (shared + [20 + own % 30] * self.num_own)[: MAX_MODEL_LEN - 1]


PROMPTS = st.builds(
    Prompt,
    document=st.integers(0, 1),
    num_shared=LENGTHS,
    num_own=st.sampled_from([0, 0, 1, 40]),
    max_tokens=st.sampled_from([200, 100, 60, 30, 2, 1]),
    prompt_logprobs=st.sampled_from([False, False, False, True]),
)


@dataclass(frozen=True)
class Operation:
    """Requests arrive, something happens to one of those in `phase`, and steps go by.

    With `is_patient`, the engine first steps on until one is in that phase.
    """

    prompts: list[Prompt]
    kind: str
    phase: str
    is_patient: bool
    is_last: bool
    drop_output: bool
    num_steps: int
    budget: int

    def run(self, engine: PretendEngine) -> None:
        for i, prompt in enumerate(self.prompts):
            engine.add(prompt.tokens(own=i), prompt.max_tokens, prompt.prompt_logprobs)
        if self.kind == "reset":
            engine.reset()
        elif self.kind == "deliver" and engine.in_flight:
            engine.deliver()
        elif self.kind in ("abort", "preempt"):
            self._disturb(engine)
        for _ in range(self.num_steps):
            engine.step(self.budget)

    def _disturb(self, engine: PretendEngine) -> None:
        for _ in range(60 if self.is_patient else 0):
            if engine.in_phase(self.phase) or not engine.scheduler.requests:
                break
            engine.step(self.budget)
        for request_id in engine.in_phase(self.phase)[-1 if self.is_last else 0 :][:1]:
            if self.kind == "abort":
                engine.abort(request_id)
            elif self.phase != "waiting":
                engine.preempt(request_id, self.drop_output)


OPERATIONS = st.builds(
    Operation,
    prompts=st.lists(PROMPTS, min_size=1, max_size=4),
    kind=st.sampled_from(["none", "preempt", "abort", "preempt", "abort", "deliver", "reset"]),
    phase=st.sampled_from(PHASES),
    is_patient=st.sampled_from([True, True, False]),
    is_last=st.booleans(),
    drop_output=st.booleans(),
    num_steps=st.integers(0, 4) | st.sampled_from([15, 60]),
    budget=st.sampled_from([1000, 64, 16, 7]),
)


def written_out(
    kind: str,
    phase: str,
    lengths: list[int],
    compress: bool = True,
    is_late: bool = True,
    sharing: str = "approximate",
    later: tuple[int, ...] = (),
) -> dict[str, object]:
    """A schedule with something that random ones may miss."""
    case = Case(
        zipvl={
            "high_bits": 16,
            "low_bits": 16,
            "compress": compress,
            "min_tokens": MIN_TOKENS,
            "residual": 0,
            "interval": 16,
            "prefix_sharing": sharing,
        },
        block_size=16,
        spare_blocks=0,
        max_num_seqs=4,
        is_async=is_late,
        is_v2=False,
        report_lag=int(is_late),
        by_priority=False,
    )
    operations = [
        Operation(
            prompts=[Prompt(0, length, 0, 200, prompt_logprobs=False) for length in some],
            kind=kind,
            phase=phase,
            is_patient=True,
            is_last=False,
            drop_output=False,
            num_steps=2 * len(later),
            budget=64 if phase == "prefilling" else 1000,
        )
        for some in (lengths, later)
        if some
    ]
    return {"case": case, "seed": 0, "operations": operations}


WRITTEN_OUT = [
    *(written_out("abort", phase, [130]) for phase in PHASES),
    *(written_out("preempt", phase, [130]) for phase in PHASES[1:]),
    # Output fills blocks; its request is preempted, and they are found again.
    written_out("none", "waiting", [1, 1, 31, 31], compress=False, is_late=False),
    # A dense prompt begins like a sparse one.
    written_out("none", "waiting", [130], is_late=False, sharing="alike", later=(40,)),
]


def run(base: Base, case: Case, seed: int, operations: list[Operation]) -> Counter[str]:
    engine = PretendEngine(base, case, seed)
    for operation in operations:
        operation.run(engine)
    engine.drain()
    return engine.seen + engine.worker.seen


def test_no_schedule_loses_shares_or_overwrites_memory(base: Base) -> None:
    seen: Counter[str] = Counter()

    @settings(
        max_examples=200,
        derandomize=True,
        database=None,
        deadline=None,
        # Explaining a failure would run it hundreds of times more.
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        case=CASES,
        seed=st.integers(0, 2**16),
        operations=st.lists(OPERATIONS, min_size=2, max_size=7),
    )
    def check(case: Case, seed: int, operations: list[Operation]) -> None:
        seen.update(run(base, case, seed, operations))

    for schedule in WRITTEN_OUT:
        check = example(**schedule)(check)
    check()
    assert seen.keys() >= RACES, f"not met: {sorted(RACES - seen.keys())}"
