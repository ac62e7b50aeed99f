"""The tables and pictures of the report: true of the simulator. That the pages show them: docs/refresh.py."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from bench.lib.strategies import machines, plan_of, strategies
from bench.studies import parallel, stage_times
from bench.studies.parallel import (
    crossing_table,
    draw_gains,
    gain_table,
    limit_table,
    measured_table,
    pictures,
    report,
    setup_table,
)
from hiar_model.config import WanConfig
from hiar_model.schedule.costs import (
    LINKS,
    Geometry,
    Link,
    head_parallel,
    measured,
    roofline,
    unit_costs,
)
from hiar_model.schedule.plan import Plan, forwards
from hiar_model.schedule.simulator import simulate

pytestmark = pytest.mark.cpu

SVG = "{http://www.w3.org/2000/svg}"


def rows(table: list[str]) -> list[list[str]]:
    """The cells of a Markdown table, without its head."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table if line.startswith("|")][2:]


def test_pictures_show_every_task_inside_the_frame() -> None:
    for name, svg in pictures().items():
        root = ElementTree.fromstring(svg)
        width, height = float(root.attrib["width"]), float(root.attrib["height"])
        boxes = root.findall(f"{SVG}rect")[1:]
        for box in boxes:
            assert 0 <= float(box.attrib["x"]) <= width - float(box.attrib["width"])
            assert 0 <= float(box.attrib["y"]) <= height - float(box.attrib["height"])
        legend, framed = 2 * 4, sum(box.attrib["fill"] == "none" for box in boxes)
        if name == "schedule_one_rank.svg":
            plans = [(Plan(4, order, 3), 4) for order in ("block_first", "stream", "step_first")]
        else:
            plans = [(Plan(4, "stream", 3), 6)] * 3 + [(Plan(4, "stream", 3, fuse_cache_denoise=True), 6)]
            assert framed == 4 * 5
        assert len(boxes) - legend - framed == sum(forwards(plan.groups(n)) for plan, n in plans)


# The tables are right.


def test_gains_agree_with_the_closed_forms() -> None:
    for s, n, *gains in rows(gain_table(unit_costs(), steps=(2, 4, 8))):
        steps, blocks = int(s), int(n)
        best = (simulate(plan_of("block_first", steps), blocks, 1).time) / (2 * blocks + steps - 2)
        assert gains[-1] == f"{best:.2f}"
        assert gains[0] == f"{((steps + 1) * blocks - 1) / (2 * steps * blocks - steps):.2f}"


def test_gains_are_drawn(tmp_path: Path) -> None:
    draw_gains(tmp_path / "gains.png", blocks=(2, 7))
    assert (tmp_path / "gains.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["gains.png"]


def test_limits() -> None:
    for s, base, own, pipe, gain, each, enough, *_ in rows(limit_table((2, 4, 8))):
        steps, n = int(s), int(enough)
        assert [float(x) for x in (base, own, pipe, gain)] == [steps + 1, 2 * steps, 2, (steps + 1) / 2]
        assert each == f"{(steps + 1) / (2 * steps):.1%}"
        reached = [
            simulate(plan_of("block_first", steps), m, 1).time / simulate(plan_of("stream", steps), m, steps).time
            for m in (n - 1, n)
        ]
        assert reached[0] < 0.9 * float(gain) <= reached[1]


@pytest.mark.parametrize(("steps", "ranks"), [(4, 2), (4, 4), (8, 4)])
def test_both_are_equally_fast_at_the_crossing(steps: int, ranks: int) -> None:
    model = "wan2.1-t2v-1.3b"
    rate = next(float(row[-1]) for row in rows(crossing_table([model], [100.0], [steps])) if row[2] == str(ranks)) * 1e9
    config, link = WanConfig.from_name(model), Link("crossing", rate, 0.0)
    costs = roofline(config, 100.0, link)
    shared = head_parallel(costs, config, Geometry(), ranks, link)
    ulysses = simulate(plan_of("block_first", steps), 60, 1, shared).steady_interval
    pipeline = simulate(plan_of("stream", steps), 60, ranks, costs).steady_interval
    assert ulysses == pytest.approx(pipeline, rel=0.005)  # the rate is printed with three digits


def test_strategies() -> None:
    machine = next(m for m in machines(links=("pcie",)) if m.name == "wan2.1-t2v-1.3b")
    by_name = {strategy.name: strategy for strategy in strategies(machine)}
    times = {name: strategy.run(27).time for name, strategy in by_name.items()}
    assert times["pipeline of 3 (2+1+1 steps)"] == pytest.approx(times["pipeline of 2"], rel=1e-3)
    assert times["stream"] == pytest.approx(times["step_first"])
    table = {row[0]: row for row in rows(setup_table(machine))}
    assert table.keys() == by_name.keys()
    for name, row in table.items():
        assert row[1] == str(by_name[name].gpus)
        seconds = by_name[name].run(27).time
        assert row[7] == f"{by_name[name].videos * (1 + 4 * (3 * 27 - 1)) / seconds:.1f}"
        assert float(row[8]) <= float(row[7])  # decoding costs time
    assert not [s.name for s in strategies(machine, steps=8, gpus=8) if "Ulysses" in s.name]  # 12 heads
    assert "No Ulysses over 8: 12 heads cannot be divided evenly." in setup_table(machine, 8, 3, 8)


# From measured stage times.


def test_report_from_stage_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "STEPS", (2, 4))
    file = tmp_path / "stages.json"
    stages = {"model": "wan2.1-t2v-1.3b", "device": "a test", "revision": "r1", "height": 60, "width": 104}
    stages |= {"frames_per_block": 3, "denoise_s": [[3, 0.5], [21, 2.0]], "cache_s": [[3, 0.5], [21, 2.0]]}
    file.write_text(json.dumps(stages))
    text = "\n".join(report(file))
    assert "stage times measured on a test, revision r1" in text and "FLOP of a task / " not in text
    assert text.count("Strategies for 27 blocks") == len(LINKS)
    # a block of a full window: 4 denoise tasks and one cache task of 2 s
    assert "| block_first | 1 | 242 | 1.00 | 2 | 10 | 18 (1.8) |" in text
    file.write_text(json.dumps(stages | {"model": "toy", "height": 16, "width": 16}))
    assert "No Ulysses over 4: 2 heads cannot be divided evenly." in "\n".join(report(file))
    per_step = [[[3, 0.5]], [[3, 0.25]]]
    file.write_text(json.dumps(stages | {"denoise_s": per_step, "cache_s": per_step}))
    text = "\n".join(report(file))
    assert "Strategies for" not in text and "| 2 | 27 |" in text  # two curves: two steps


def test_the_report_shows_its_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Tables are printed one by one: measurements come before the first simulation."""
    shown: list[str] = []

    def stop(*_: object) -> list[str]:
        shown.append(capsys.readouterr().out)
        raise KeyboardInterrupt

    monkeypatch.setattr(parallel, "limit_table", stop)
    monkeypatch.setattr("sys.argv", ["parallel"])
    with pytest.raises(KeyboardInterrupt):
        parallel.main()
    assert shown[0].startswith("# Rollouts measured on one GPU") and "| H200, " in shown[0]
    assert "## Where the time of a task goes, ms" in shown[0] and "Steady state" not in shown[0]


def row_of(order: str, strategy: str, ranks: int, seconds: float, **more) -> dict:
    row = {
        "order": order,
        "way": strategy,
        "ranks": ranks,
        "split": [4],
        "blocks": 27,
        "measured": True,
        "seconds": seconds,
    }
    numbers = {"first_block": 0.5, "interval": 0.25, "prompt": None, "fps": 24.0, "fps_vae": 15.0, "predicted": seconds}
    return {**row, **numbers, **more}


def test_the_table_of_what_was_measured():
    rows = [
        row_of("block_first", "alone", 1, 10.0),
        row_of("stream", "pipeline", 4, 4.0, split=[1, 1, 1, 1], measured=False),
        row_of("block_first", "replicas", 4, 10.0, predicted=None),
    ]
    out = measured_table({"environment": {"device": "a GPU", "visit_s": {}}, "rows": rows})
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out[2:5]]
    assert cells[1][:4] == ["27", "stream", "pipeline of 4, projected", "1+1+1+1"]
    assert cells[1][4:] == ["4", "2.5", "0.5", "0.25", "", "24", "15", "4"]
    assert cells[2][2:6] == ["replicas of 4", "", "10", "4"] and cells[2][-1] == ""
    assert "- device: a GPU" in out and not any("visit_s" in line for line in out)


def test_stage_times_feed_the_simulator(tmp_path, capsys):
    target = tmp_path / "stages.json"
    stage_times.main([str(target), "--model", "toy", "--layers", "2", "--window-frames", "6"])
    assert capsys.readouterr().out == f"stage times: {target}\n"
    _, geometry, costs = measured(target, LINKS["pcie"])
    assert (geometry.height, geometry.width) == (8, 8)
    seen = [frames for frames, _ in json.loads(target.read_text())["denoise_s"]]
    assert seen == [3, 6] and costs.curve("denoise", 0)(6) > 0
