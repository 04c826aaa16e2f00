"""The settings of the plugin: one frozen dataclass, validated when it is built."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

HIGH_BITS = (16, 8, 4)
LOW_BITS = (16, 8, 4, 2, 0)
PREFIX_SHARING = ("approximate", "exact")
PREFILL_KERNELS = ("auto", "flash_attn", "triton")
KEY = "zipvl"


@dataclass(frozen=True)
class ZipVLConfig:
    """What `--additional-config '{"zipvl": {...}}'` may set.

    Attributes:
        tau: Share of the probes' attention mass that a layer attends to in prefill, and that the
            tokens carry which the cache keeps at `high_bits`.
        ratio: Fixed share of tokens to keep in every layer, instead of `tau`.
        high_bits: Precision of the kept tokens' keys and values in the cache; 16 means
            the model's own dtype.
        low_bits: Precision of the others; 0 evicts them.
        window: Newest tokens that every query of a sparse prefill attends to, itself among them.
        sinks: First tokens of the context that every query attends to. With `window` and `sinks`
            0 a token that is not kept gets no attention output, as in the paper.
        probe_recent: Number of the chunk's last positions that probe.
        probe_random: Number of random positions of the chunk that probe.
        min_tokens: Contexts shorter than this prefill densely.
        interval: Number of tokens decoded between two compressions of the tail.
        residual: Number of newest tokens that stay dense.
        max_kept: Upper bound of the share of a prompt kept at `high_bits`, mean over layers.
            Affects the cache only.
        seed: Seed of the random probes.
        sparse_prefill: Whether prefill attends to kept tokens and neighbourhoods alone.
        compress: Whether the cache is compressed after the prompt and during decode.
        prefix_sharing: "approximate" lets other requests reuse blocks computed by sparse
            prefill; "exact" keeps such blocks out of the prefix cache.
        prefill_kernel: What computes prefill attention; "auto" is the first that runs of
            flash_attn and triton, and on a CPU the kernels of vLLM and torch.

    Raises:
        ValueError: A value is of the wrong type, out of range or inconsistent. The message
            names the key, the value and the choices.
    """

    tau: float = 0.975
    ratio: float | None = None
    high_bits: int = 4
    low_bits: int = 4
    window: int = 64
    sinks: int = 4
    probe_recent: int = 64
    probe_random: int = 64
    min_tokens: int = 2048
    interval: int = 128
    residual: int = 32
    max_kept: float = 1.0
    seed: int = 0
    sparse_prefill: bool = True
    compress: bool = True
    prefix_sharing: str = "approximate"
    prefill_kernel: str = "auto"

    def __post_init__(self) -> None:
        self._check_share("tau", self.tau)
        if self.ratio is not None:
            self._check_share("ratio", self.ratio, "null or ")
        self._check_share("max_kept", self.max_kept)
        self._check_choice("high_bits", self.high_bits, HIGH_BITS)
        self._check_choice("low_bits", self.low_bits, LOW_BITS)
        if self.low_bits > self.high_bits:
            lower = tuple(bits for bits in LOW_BITS if bits <= self.high_bits)
            self._fail("low_bits", self.low_bits, f"at most high_bits: one of {lower}")
        self._check_int("window", self.window, 0)
        self._check_int("sinks", self.sinks, 0)
        self._check_int("probe_recent", self.probe_recent, 1)
        self._check_int("probe_random", self.probe_random, 0)
        self._check_int("min_tokens", self.min_tokens, 1)
        self._check_int("interval", self.interval, 1)
        self._check_int("residual", self.residual, 0)
        self._check_int("seed", self.seed, 0)
        for name in ("sparse_prefill", "compress"):
            if not isinstance(getattr(self, name), bool):
                self._fail(name, getattr(self, name), "true or false")
        if not (self.sparse_prefill or self.compress):
            self._fail("compress", False, "true where zipvl.sparse_prefill is false")
        self._check_choice("prefix_sharing", self.prefix_sharing, PREFIX_SHARING)
        self._check_choice("prefill_kernel", self.prefill_kernel, PREFILL_KERNELS)

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> "ZipVLConfig":
        """Build from vLLM's `additional_config`; a missing "zipvl" entry means defaults.

        Raises:
            ValueError: "zipvl" is not a mapping, has an unknown key, or a value is invalid.
        """
        entry = additional_config.get(KEY, {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(entry, Mapping):
            raise ValueError(f"additional_config[{KEY!r}] = {entry!r} must be an object")
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(entry) - set(known))
        if unknown:
            raise ValueError(
                f"zipvl.{unknown[0]} = {entry[unknown[0]]!r} is not a setting; "
                f"the settings are {', '.join(known)}"
            )
        return cls(**entry)

    @property
    def keeps_all(self) -> bool:
        """Whether the count rule keeps every token."""
        return self.ratio is None and self.tau == 1

    @property
    def prefills_sparsely(self) -> bool:
        """Whether prefill attention leaves anything out."""
        return self.sparse_prefill and not self.keeps_all

    @property
    def chooses_for_cache(self) -> bool:
        """Whether tokens of the cache differ in precision."""
        all_high = self.keeps_all and self.max_kept == 1
        return self.compress and self.high_bits != self.low_bits and not all_high

    @staticmethod
    def _fail(name: str, value: Any, choices: str) -> None:
        raise ValueError(f"zipvl.{name} = {value!r} must be {choices}")

    def _check_share(self, name: str, value: Any, prefix: str = "") -> None:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not 0 < value <= 1:
            self._fail(name, value, f"{prefix}a number above 0 and at most 1")

    def _check_int(self, name: str, value: Any, at_least: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
            self._fail(name, value, f"a whole number of at least {at_least}")

    def _check_choice(self, name: str, value: Any, choices: tuple[Any, ...]) -> None:
        if isinstance(value, bool) or value not in choices:
            self._fail(name, value, f"one of {choices}")
