"""bench/studies/toy_table.py: mean and spread of evaluations over training seeds."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import pytest
from refusals import refused

from bench.studies.toy_table import main, table
from hiar_model.config import RolloutConfig

pytestmark = pytest.mark.cpu


def write(
    folder, name: str, values: Sequence[float] = (1.0,), sha: str | None = None, seed: int = 0, **changes
) -> None:
    """A file of `hiar evaluate toy --json`, a row for each valid share (in the last part; the first has 1)."""
    part = {"colour": 1.0, "shape": 0.5, "valid": 1.0, "direction": 1.0, "speed_ratio": 0.8, "background_change": 0.1,
            "texture_kept": 0.5, "texture_ratio": 0.7}  # fmt: skip
    rows = [
        {
            "rollout": RolloutConfig(order="stream", window_frames=9).to_dict(), "num_frames": 96 * 4**i, "forwards": 8,
            "visible_frames": 9.0, "whole": {**part, "valid": value}, "parts": [part, {**part, "valid": value}],
            "drift": value - 1, "diversity": None, **changes,
        }
        for i, value in enumerate(values)
    ]  # fmt: skip
    content = {"weights_sha256": sha or name, "prompts": 64, "seed": seed, "rows": rows}
    (folder / name).write_text(json.dumps(content))


def test_table_is_mean_and_spread_over_seeds(tmp_path):
    for seed, valid in enumerate((0.5, 0.7, 0.9)):
        write(tmp_path, f"hiar-seed{seed}.json", [1.0, valid])
    write(tmp_path, "self-forcing-seed10.json", [0.4, 0.1])
    lines = table(tmp_path).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    named = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    assert [(row["frames"], row["variant"], row["seeds"]) for row in named] == [
        ("96", "hiar", "3"), ("96", "self-forcing", "1"), ("384", "hiar", "3"), ("384", "self-forcing", "1"),
    ]  # fmt: skip
    assert named[2]["valid %"] == "70.0 ± 20.0" and named[2]["drift of valid"] == "-30.0 ± 20.0"
    assert named[3]["valid %"] == "10.0" and named[3]["background change"] == "0.100"
    assert named[0]["speed/truth"] == "0.80 ± 0.00" and named[0]["shape %"] == "50.0 ± 0.0"
    assert (named[0]["forwards"], named[0]["see"]) == ("8", "9.0")
    assert not any("diversity" in heading for heading in rows[0]), "no evaluation measured it"
    assert "1/2" in lines[-1]


def test_table_shows_what_some_measured(tmp_path):
    write(tmp_path, "a-seed0.json", diversity={"background": 0.5, "texture": 0.25, "start": None})
    write(tmp_path, "b-seed0.json")
    head, _, a, b, *_ = table(tmp_path).splitlines()
    assert "diversity: background" in head and "start" not in head
    assert "| 0.50 | 0.25 | 8 |" in a and "| - | - | 8 |" in b


def test_seeds_of_the_noise_by_part(tmp_path):
    """The same weights with other noise; and where a video is good."""
    for seed, valid in enumerate((0.5, 0.7)):
        write(tmp_path, f"a-seed{seed}.json", [valid], sha="same", seed=seed)
    head, _, row, *_ = table(tmp_path, by_part=True).splitlines()
    assert "| valid % | 1/2 | 2/2 |" in head
    assert "| a | stream | 2 | 60.0 ± 14.1 | 100.0 ± 0.0 | 60.0 ± 14.1 |" in row
    write(tmp_path, "a-seed2.json", sha="other", seed=2)
    with pytest.raises(ValueError, match=r"a-seed1.json was measured in another way"):
        table(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no VARIANT-seedN.json"),
        ({"a.json": {}}, "a.json is not named VARIANT-seedN.json"),
        ({"a-seedx.json": {}}, "is not named"),
        ({"a-seed0.json": {}, "a-seed1.json": {"num_frames": 48}}, "variant a: a-seed1.json .* in another way"),
        ({"a-seed0.json": {}, "a-seed1.json": {"rollout": {"order": "stream"}}}, "in another way than a-seed0.json"),
        ({"a-seed0.json": {"sha": "x"}, "a-seed1.json": {"sha": "x"}}, "a-seed1.json and a-seed0.json .* same weights"),
        ({"a-seed0.json": {"parts": []}}, "a-seed0.json is not a result of hiar evaluate toy"),
        ({"a-seed0.json": {"values": ()}}, "no rows"),
    ],
)  # fmt: skip
def test_table_refuses(tmp_path, files, message):
    for name, changes in files.items():
        write(tmp_path, name, **changes)
    with refused(message):
        table(tmp_path)


def test_table_refuses_what_is_no_evaluation(tmp_path):
    (tmp_path / "a-seed0.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a-seed0.json is not a result .*KeyError\('rows'\)"):
        table(tmp_path)
    with pytest.raises(ValueError, match="is not a folder of evaluations"):
        table(tmp_path / "nowhere")


def test_files_of_before_0_2_are_read(tmp_path):
    """They spell three options of the rollout."""
    write(tmp_path, "a-seed0.json")
    file = tmp_path / "a-seed0.json"
    content, new = json.loads(file.read_text()), table(tmp_path)
    for row in content["rows"]:
        row |= {"order": "stream", "cache_source": "own", "window_frames": [9] * 4}
        del row["rollout"]
    file.write_text(json.dumps(content))
    assert table(tmp_path) == new


def test_the_script(tmp_path, capsys, monkeypatch):
    write(tmp_path, "a-seed0.json")
    monkeypatch.setattr(sys, "argv", ["toy_table", str(tmp_path)])
    main()
    assert capsys.readouterr().out == table(tmp_path)
    monkeypatch.setattr(sys, "argv", ["toy_table", str(tmp_path), "--by-part"])
    main()
    assert capsys.readouterr().out == table(tmp_path, by_part=True)
