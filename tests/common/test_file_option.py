"""FILE:SCALE and FILE@FRAME, on the command line and in Python."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hiar_model.common.image_file import ImageFile, image_files
from hiar_model.common.lora_file import LoraFile, lora_files

pytestmark = pytest.mark.cpu


def test_one_or_several():
    style = LoraFile("style.safetensors", 0.5)
    for one in ("style.safetensors:0.5", ("style.safetensors", 0.5), ("style.safetensors", np.float32(0.5)), style):
        assert lora_files(one) == lora_files([one]) == (style,)
    two = (LoraFile("a"), LoraFile("b", 2.0))
    for several in (("a", "b:2"), ["a", ("b", 2)], [Path("a"), LoraFile("b", 2)], (("a", 1), ("b", 2)), iter(two)):
        assert lora_files(several) == two
    assert lora_files(None) == image_files(None) == ()
    for one in ("face.png@3", ("face.png", 3), ("face.png", np.int64(3)), ImageFile("face.png", 3)):
        assert image_files(one) == (ImageFile("face.png", 3),)
    assert image_files(["b.png@6", "a.png"]) == (ImageFile("a.png"), ImageFile("b.png", 6))


def test_a_name_with_the_mark(tmp_path):
    """A file that is there is that file, whatever its name looks like."""
    for name in ("a@3.png", "a:2", "plain"):
        (tmp_path / name).touch()
    assert ImageFile.of(f"{tmp_path}/a@3.png") == ImageFile(f"{tmp_path}/a@3.png")
    assert ImageFile.of(f"{tmp_path}/a@3.png@6").frame == 6
    assert LoraFile.of(f"{tmp_path}/a:2").scale == 1.0 and LoraFile.of(f"{tmp_path}/a:2:0.5").scale == 0.5
    for of, value, message in (
        (ImageFile.of, f"{tmp_path}/plain@-3", "image .*plain@-3: the frame must be a whole number from 0, got '-3'"),
        (LoraFile.of, f"{tmp_path}/plain:", "lora .*plain:: the scale must be a number, got ''"),
        (LoraFile.of, ("plain", "0.5"), "lora scale must be a finite number, got '0.5'"),
        (ImageFile.of, ("plain", True), "image frame must be a whole number of at least 0, got True"),
        (ImageFile.of, np.zeros((4, 4, 3)), "image must be the path of a picture, got ndarray$"),
        (image_files, bytes(1000), r"image must be a file, \(file, number\), or a list of these, got bytes$"),
        (image_files, "https://host/a.png@9", "image must be the path of a picture, got https://host/a.png@9: a URL"),
    ):
        with pytest.raises(ValueError, match=message):
            of(value)
