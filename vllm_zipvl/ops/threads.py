"""numba's threads, as many as torch's."""

from functools import cache

import numba
import torch


@cache
def _launch_threads() -> None:
    """Start numba's threads, which share OpenMP's settings with torch: put torch's back."""
    num_threads = torch.get_num_threads()
    numba.get_num_threads()
    torch.set_num_threads(num_threads)


def match_num_threads() -> None:
    """Let the next parallel kernel use as many threads as torch does; to be called before each."""
    _launch_threads()
    wanted = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    if numba.get_num_threads() != wanted:
        numba.set_num_threads(wanted)
