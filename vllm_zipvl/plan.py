"""What the scheduler tells the workers in every step, and what they answer."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class ChunkPlan:
    """A scheduled request that computes tokens of its prompt.

    After a preemption all tokens known at resumption are the prompt.

    Attributes:
        request_id: The request, for messages.
        slot: Its row in the workers' tables.
        last_block_id: The dense block that holds its last token of this step.
        start: Tokens computed before this step.
        end: Tokens computed after it.
        ends_prompt: Whether the prompt is complete after this step.
        attends_densely: Whether sparse prefill is off for this request.
    """

    request_id: str
    slot: int
    last_block_id: int
    start: int
    end: int
    ends_prompt: bool
    attends_densely: bool

    @property
    def is_single_token(self) -> bool:
        """Whether it is one token, which attends to all of its context as a decode step does.

        vLLM replays the CUDA graph of decode steps for it.
        """
        return self.end - self.start == 1


@dataclass(slots=True)
class CompressionPlan:
    """Tokens [start, end) of a request move from dense blocks to heap pages after this step.

    Attributes:
        plan_id: Unique over the life of the engine; the report answers by it.
        request_id: The request, for messages.
        slot: Its row in the workers' tables.
        start: First token; a multiple of the block size. The request's head stays dense.
        end: Token after the last; a multiple of the block size.
        context_len: Tokens that the decision refers to.
        is_prompt: Whether the prompt's selection decides, else this step's query.
        head_block_ids: Blocks that hold the context before token `start`, of a prompt.
        dense_block_ids: Blocks that hold the context from token `start` on.
        heap_block_ids: The request's heap blocks, all of them.
        first_page: The first of the request's pages that is not in use yet.
        is_first: Whether these are the request's first tokens in pages.
    """

    plan_id: int
    request_id: str
    slot: int
    start: int
    end: int
    context_len: int
    is_prompt: bool
    head_block_ids: list[int]
    dense_block_ids: list[int]
    heap_block_ids: list[int]
    first_page: int
    is_first: bool


@dataclass
class StepPlan:
    """Everything a worker needs to know about a step.

    The block that holds a request's last token belongs to that request alone, so it names the
    request's row in the batch. Scheduled requests that appear nowhere here go on decoding.

    Attributes:
        new_slots: Slots that got a new owner since the last step.
        slot_of_block: Slots of the blocks that may have become a request's last one.
        chunks: The scheduled requests that compute prompt tokens.
        compressions: What to compress after the forward pass.
    """

    new_slots: list[int] = field(default_factory=list)
    slot_of_block: dict[int, int] = field(default_factory=dict)
    chunks: list[ChunkPlan] = field(default_factory=list)
    compressions: list[CompressionPlan] = field(default_factory=list)


@dataclass
class CompressionReport:
    """The outcome of one `CompressionPlan`.

    Attributes:
        num_pages: Pages of the request in use, all compressions together.
        num_kept: Tokens kept at high precision by this compression, one count per layer.
    """

    num_pages: int
    num_kept: list[int]


@dataclass
class StepReport:
    """Reports by plan id."""

    compressions: dict[int, CompressionReport]

    def check_same(self, other: "StepReport") -> None:
        """All tensor-parallel ranks must agree.

        Raises:
            RuntimeError: The other rank's report differs.
        """
        if other != self:
            raise RuntimeError(
                "tensor-parallel ranks disagree on what was compressed: "
                f"{self} against {other}; their attention scores must be equal"
            )
