import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_checkpoints

CHECKPOINTS = Path(__file__).parents[1] / ".cache" / "checkpoints"


@pytest.fixture(scope="session")
def checkpoint() -> Callable[..., Path]:
    """`checkpoint(family, **overrides)`: the folder of a tiny checkpoint, made once and kept.

    The overrides are the fields of `tiny_checkpoints.TinyCheckpoint`. What is kept is found by
    the parameters and by the maker's own source, so a changed maker makes new checkpoints.
    """

    def find_or_make(family: str, **overrides: object) -> Path:
        spec = tiny_checkpoints.TinyCheckpoint(family, **overrides)
        folder = CHECKPOINTS / f"{family}-{tiny_checkpoints.key_of(spec)}"
        if not folder.exists():
            CHECKPOINTS.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=CHECKPOINTS) as unfinished:
                tiny_checkpoints.make(spec, Path(unfinished) / "made")
                publish(Path(unfinished) / "made", folder)
        return folder

    return find_or_make


def publish(made: Path, folder: Path) -> None:
    """Rename into place; another process may have made the same checkpoint meanwhile."""
    try:
        os.rename(made, folder)
    except OSError:
        if not folder.exists():
            raise
