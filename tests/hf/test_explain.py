"""`python -m vllm_zipvl.explain`: which patches are shown, and one line for bad input."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vllm_zipvl import explain


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("image") / "picture.png"
    Image.linear_gradient("L").resize((200, 140)).convert("RGB").save(file)
    return file


def run(model: Path | str, image: Path, out: Path, *more: str) -> None:
    question = ["--question", "What is it?", "--max-tokens", "4"]
    explain.main(
        ["--model", str(model), "--image", str(image), "--out", str(out), *question, *more]
    )


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_a_figure_of_every_family(checkpoint, family, image, tmp_path, capsys, monkeypatch) -> None:
    found = []
    draw = explain.draw
    monkeypatch.setattr(explain, "draw", lambda *args: (found.append(args[0]), draw(*args)))
    out = tmp_path / "kept.png"
    run(
        checkpoint(family, dtype="float32", image_size=112),
        image,
        out,
        "--ratio",
        "0.5",
        "--probe-recent",
        "8",
    )
    (one,) = found
    assert one.kept.shape == (2, 8, 8)
    assert 0 < one.kept.mean() < 1
    assert all(0.5 <= share < 0.9 for share in one.shares)
    assert one.picture.shape == (112, 112, 3)
    # A gradient from dark to light, as the model sees it.
    assert one.picture[0].mean() < 0.2 < 0.8 < one.picture[-1].mean()
    pixels = np.asarray(Image.open(out).convert("L"))
    assert pixels.std() > 10
    assert f"of {one.num_tokens} tokens, mean over layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("family", "image_name", "more", "message"),
    [
        ("llava", "picture.png", ("--out", "kept.txt"), "kept.txt must end in one of "),
        ("llama", "picture.png", (), "has no vision tower (llama); choose a LLaVA-family"),
        ("llava", "missing.png", (), "No such file or directory"),
        ("llava", "picture.png", ("--tau", "2"), "zipvl.tau = 2.0 must be a number above 0"),
    ],
)
def test_bad_input_is_one_line(
    checkpoint, image, tmp_path, family, image_name, more, message
) -> None:
    model = checkpoint(family, dtype="float32", image_size=112)
    with pytest.raises(SystemExit) as stopped:
        run(model, image.with_name(image_name), tmp_path / "x.png", *more)
    assert str(stopped.value).startswith("explain: ")
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)
