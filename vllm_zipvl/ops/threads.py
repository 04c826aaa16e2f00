"""numba's threads, as many as torch's."""

import ctypes
from functools import cache

import numba
import torch


@cache
def _launch_threads() -> None:
    """Start numba's threads, which share OpenMP's settings with torch: put torch's back.

    numba lets parallel regions nest. Within torch's own, such as those of its flash attention, each
    small matrix product would then start a team of threads, which takes many times as long.
    """
    num_threads, openmp = torch.get_num_threads(), torchs_openmp()
    numba.get_num_threads()
    torch.set_num_threads(num_threads)
    if openmp:
        openmp.omp_set_nested(0)


def torchs_openmp() -> ctypes.CDLL | None:
    """The OpenMP that torch uses; None if it uses another kind of threads."""
    library = ctypes.CDLL(torch._C.__file__)
    return library if hasattr(library, "omp_set_nested") else None


def match_num_threads() -> None:
    """Let the next parallel kernel use as many threads as torch does; to be called before each."""
    _launch_threads()
    wanted = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    if numba.get_num_threads() != wanted:
        numba.set_num_threads(wanted)
