"""The simulator's speedups on several GPUs: tables and pictures for README and docs/ (docs/refresh.py).

    python -m bench.studies.parallel                      all tables, as Markdown
    python -m bench.studies.parallel --plot gains.png     speedup by number of blocks, a line per number of steps

These are projections from a roofline or from stage times measured on one GPU. Whole rollouts that were measured are in
bench/lib/gpu_tables.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.lib import gpu_tables
from bench.lib.script import script
from bench.lib.strategies import MODELS, TFLOPS, VAE_MS, WINDOW, Machine, machines, plan_of, strategies
from bench.lib.timeline import draw
from hiar_model.config import WAN, WanConfig
from hiar_model.schedule.costs import (
    LINKS,
    CostCurve,
    Costs,
    Geometry,
    exchanged_bytes,
    task_flop,
    uneven_heads,
    unit_costs,
)
from hiar_model.schedule.plan import Plan
from hiar_model.schedule.simulator import ROUNDING, Simulation, Timeline, simulate

STEPS = (2, 4, 8, 20, 50)
BLOCKS = (7, 27, 81, 200)
RANKS = (1, 2, 4, 8, 16, 32)
GENTLE_TFLOPS = 150.0  # a consumer card
ANOTHER_MODEL = "*: another model, which has to be trained so."


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; the first column is left-aligned, the others right-aligned."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (headings, rule, *rows)]


def ranks_of(steps: int) -> list[int]:
    """The numbers of ranks in the tables for `steps` steps: powers of two, and one rank per step."""
    return sorted({*(r for r in RANKS if r <= steps), steps})


def grid_table(steps: int = 4, blocks: int = 4) -> list[str]:
    """The earliest start of every denoise and cache task, with one rank per step."""
    timeline = simulate(plan_of("stream", steps), blocks + 1, steps)
    starts = {task: event.start for event in timeline.events for item in event.items for task in item}
    rows = [
        [f"step {s}", *(f"{starts['denoise', s, n]:g}, {starts['cache', s, n]:g}" for n in range(blocks))]  # type: ignore[index]
        for s in range(steps)
    ]
    return markdown(["denoise, cache", *(f"block {n}" for n in range(blocks))], rows)


# Gain over one GPU that runs block-first.


def gain_table(
    costs: Costs, steps: Sequence[int] = STEPS, blocks: Sequence[int] = BLOCKS, frames_per_block: int = 3
) -> list[str]:
    """Speedup of a pipeline over one rank block-first, by steps S, blocks N and ranks."""
    rows, gap = [], 0.0
    for s in steps:
        for n in blocks:
            base = simulate(plan_of("block_first", s, frames_per_block=frames_per_block), n, costs=costs).time
            simulation = Simulation(plan_of("stream", s, frames_per_block=frames_per_block), n, costs)
            timelines = {ranks: simulation.timeline(ranks) for ranks in ranks_of(s)}
            gap = max(gap, *(1 - timeline.lower_bound / timeline.time for timeline in timelines.values()))
            cells = {ranks: f"{base / timeline.time:.2f}" for ranks, timeline in timelines.items()}
            rows.append([f"{s}", f"{n}", *(cells.get(r, "") for r in RANKS), cells[s]])
    note = "No other split of the steps over the ranks is faster"
    note += "." if gap <= ROUNDING else f" by more than {max(gap, 0.0001):.2%}."
    return [*markdown(["S", "N", *(f"{r} ranks" if r > 1 else "1 rank" for r in RANKS), "S ranks"], rows), "", note]


def limit_table(steps: Sequence[int] = STEPS) -> list[str]:
    """Steady-state speedup of a pipeline of S ranks, all tasks of one cost."""
    rows = []
    for s in steps:
        base, own, pipe = (
            simulate(plan_of(order, s), 3 * s + 20, ranks)
            for order, ranks in (("block_first", 1), ("stream", 1), ("stream", s))
        )
        interval = [timeline.steady_interval or 0.0 for timeline in (base, own, pipe)]
        gain = interval[0] / interval[2]
        enough = next(n for n in range(1, 100 * s) if _gain(s, n) >= 0.9 * gain)
        fused = simulate(plan_of("stream", s, fuse_cache_denoise=True), 3 * s + 20, s, in_flight=s)
        worst = [t.prompt_delay or 0.0 for t in (base, own, pipe, fused)]
        rows.append(
            [
                f"{s}",
                *(f"{x:g}" for x in interval),
                f"{gain:g}",
                f"{gain / s:.1%}",
                f"{enough}",
                *(f"{x:g}" for x in worst),
            ]
        )
    headings = ["S", "block-first every", "HiAR every", "S ranks every", "gain", "gain / GPU", "blocks for 90%"]
    return markdown([*headings, *(f"prompt: {x}" for x in ("block-first", "HiAR", "S ranks", "S ranks, fused"))], rows)


def _gain(steps: int, blocks: int) -> float:
    """Speedup of one rank per step over block-first, in closed form (tests compare it with the simulator)."""
    return ((steps + 1) * blocks - 1) / (2 * blocks + steps - 2)


# Strategies on one machine.


def setup_table(machine: Machine, steps: int = 4, blocks: int = 27, gpus: int = 4) -> list[str]:
    """All strategies for one video of `blocks` blocks."""
    rows, base = [], 0.0
    for strategy in strategies(machine, steps, gpus):
        plan, videos = strategy.plan, strategy.videos
        plain, *decoding = (strategy.run(blocks, vae) for vae in ("none", "last", "own"))
        base = base or plain.time
        frames = 1 + WAN.temporal_compression * (blocks * plan.frames_per_block - 1)
        fps = [videos * frames / timeline.time for timeline in (plain, *decoding)]
        interval, delay = plain.steady_interval, plain.prompt_delay
        prompt = f"{_short(delay)} ({delay / interval:.1f})" if delay is not None and interval is not None else "-"
        cells = [
            _short(plain.time),
            f"{videos * base / plain.time:.2f}",
            _short(plain.first_block),
            "-" if interval is None else _short(interval),
            "-" if plan.fuse_cache_denoise else prompt,  # both tasks of a fused item have the same prompt
            f"{fps[0]:.1f}",
            f"{fps[1]:.1f}",
            f"{fps[2]:.1f}" if videos == 1 else "-",
            _short((strategy.exchanged or plain.bytes_sent / blocks) / 1e6),
            f"{sum(plain.utilisation) / plain.ranks:.0%}",
        ]
        rows.append([strategy.name, f"{strategy.gpus}", *cells])
    headings = ["strategy", "GPUs", "whole s", "gain", "first block s", "then every s", "prompt s (blocks)"]
    headings += ["fps", "fps, VAE on the last GPU", "fps, VAE on one GPU more", "MB sent per block", "busy"]
    reason = uneven_heads(machine.config, machine.geometry, gpus)
    notes = [f"No Ulysses over {gpus}: {reason}.", ""] if reason else []
    return [*markdown(headings, rows), "", *notes, ANOTHER_MODEL]


def link_table(all_machines: Sequence[Machine], blocks: int = 27) -> list[str]:
    """Speedup of some strategies over one GPU block-first, by model and link."""
    picked = [f"{order}, Ulysses over 4" for order in ("block_first", "stream")]
    picked += ["pipeline of 2", "pipeline of 4", "pipeline of 3, shared KV*"]
    rows = []
    for machine in all_machines:
        by_name = {strategy.name: strategy for strategy in strategies(machine)}
        base = by_name["block_first"].run(blocks).time
        gains = (f"{base / by_name[name].run(blocks).time:.2f}" if name in by_name else "-" for name in picked)
        rows.append([machine.name, machine.link.name, *gains])
    sources = sorted({machine.costs.source for machine in all_machines})
    assumed = [f"- {source}; latencies, sizes and windows as in the tables of each machine" for source in sources]
    return [
        *markdown(["model", "link", *picked], rows),
        "",
        ANOTHER_MODEL,
        "",
        *assumed,
    ]


def memory_table(models: Sequence[str] = MODELS, gpus: int = 4, steps: int = 4) -> list[str]:
    """GiB of cached keys and values on one GPU, bfloat16, full window; every GPU has all weights."""
    rows = []
    for model in models:
        config, g = WanConfig.from_name(model), Geometry()
        step = g.key_bytes(config) / g.frames_per_block * WINDOW / 2**30
        rows.append([model, *(f"{x * step:.1f}" for x in (1, 1 / gpus, steps, steps / gpus, steps / gpus))])
    names = ("block_first", f"block_first, Ulysses over {gpus}", "stream", f"stream, Ulysses over {gpus}")
    return markdown(["model", *names, f"pipeline of {gpus}"], rows)


def _short(value: float) -> str:
    """Three significant digits, no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


# The link speed above which context parallelism is faster.


def crossing_table(
    models: Sequence[str] = MODELS, tflops: Sequence[float] = (TFLOPS, GENTLE_TFLOPS), steps: Sequence[int] = STEPS
) -> list[str]:
    """The bandwidth above which head-parallel block-first beats a pipeline on as many GPUs in the steady state.

    (S+1) (V/R + X/bandwidth) = P V, where V is the time of a task over a full window, X the bytes that a GPU sends
    during it, and P V the interval of the pipeline. Latencies are left out.
    """
    rows = []
    for model in models:
        config, g = WanConfig.from_name(model), Geometry()
        frame = g.frame_tokens(config)
        flop = task_flop(config, g.frames_per_block * frame, WINDOW * frame)
        for s in steps:
            for ranks in (r for r in (2, 4, 8) if r <= s and not config.num_heads % r):
                pace = simulate(plan_of("stream", s), 3 * s + 20, ranks).steady_interval or 0.0
                sent = exchanged_bytes(config, g, ranks)
                rates = []
                for speed in tflops:
                    task = flop / (speed * 1e12)
                    rates.append((s + 1) * sent / (task * (pace - (s + 1) / ranks)) / 1e9)
                efficiency = (s + 1) / ranks / pace
                rows.append(
                    [model, f"{s}", f"{ranks}", f"{sent / 1e6:.0f}", f"{efficiency:.1%}", *(f"{r:.3g}" for r in rates)]
                )
    headings = ["model", "S", "GPUs", "MB per GPU and task", "efficiency needed"]
    table = markdown([*headings, *(f"GB/s at {speed:g} TFLOP/s" for speed in tflops)], rows)
    note = f"- roofline: FLOP of a task over a full window of {WINDOW} / TFLOP/s (not measured); no latencies"
    return [*table, "", note]


# Pictures.


def pictures() -> dict[str, str]:
    """File name -> SVG of docs/pictures: four steps, all tasks of one cost."""

    def panel(name: str, order: str, blocks: int, ranks: int = 1, **options: object) -> tuple[str, Timeline]:
        timeline = simulate(Plan(4, order, 3, **options), blocks, ranks)  # type: ignore[arg-type]
        return f"{name}: first block after {timeline.first_block:g}, all {blocks} after {timeline.time:g}", timeline

    one = [panel(f"{order}, 1 rank", order, 4) for order in ("block_first", "stream", "step_first")]
    several = [panel(f"{ranks} ranks", "stream", 6, ranks) for ranks in (2, 3, 4)]
    several.append(panel("4 ranks, fused (framed: one forward)", "stream", 6, 4, fuse_cache_denoise=True))
    return {"schedule_one_rank.svg": draw(one), "schedule_pipeline.svg": draw(several)}


def draw_gains(picture: str | Path, blocks: Sequence[int] = (2, 4, 7, 14, 27, 54, 81, 120, 200)) -> None:
    """Plot the speedup over one rank block-first by number of blocks, a line per number of steps, into a .png.

    All tasks cost 1. Left: one rank per step; right: at most four ranks.
    """
    from hiar_model.io.plot import Lines, Series, save_plot

    panels = []
    for title, most in (("one rank per step", 50), ("four ranks at most", 4)):
        lines = []
        for s in STEPS:
            bases = [simulate(plan_of("block_first", s), n).time for n in blocks]
            times = [simulate(plan_of("stream", s), n, min(s, most)).time for n in blocks]
            lines.append(Series(f"{s} steps", blocks, [b / t for b, t in zip(bases, times, strict=True)]))
        gain = "gain over one rank block-first"
        panels.append(Lines(title, lines, "blocks", gain, log_x=True, points=True))
    save_plot(panels, picture)


# The report, and its tables for pages.


def quoted_tables() -> dict[str, Callable[[], list[str]]]:
    """The tables that README and docs quote, by name."""
    by_name = {f"{m.name} {name}": m for name in LINKS for m in machines(links=(name,))}

    def setup(key: str) -> Callable[[], list[str]]:
        machine = by_name[key]
        return lambda: [*setup_table(machine), "", *machine.assumptions()]

    tables: dict[str, Callable[[], list[str]]] = {
        "grid": grid_table,
        "limits": limit_table,
        "gain unit": lambda: gain_table(unit_costs()),
        "links": lambda: link_table(machines()),
        "crossing": crossing_table,
        "memory": memory_table,
    }
    tables |= {f"setups {key}": setup(key) for key in by_name}
    tables |= {"measured rollouts": gpu_tables.rollout_table, "measured parts": gpu_tables.breakdown_table}
    tables["measured newest"] = gpu_tables.newest_table
    times = gpu_tables.stage_times()
    if times is not None:
        _, fused = gpu_tables.vae_ms(times.parent)

        def timed(*links: str) -> list[Machine]:
            return machines(times, vae_ms=fused or VAE_MS, links=links or LINKS)

        tables["measured links"] = lambda: link_table(timed())
        tables["measured setups"] = lambda: [*setup_table(timed("nvlink")[0]), "", *timed("nvlink")[0].assumptions()]
    return tables


def report(stage_times: str | Path | None = None, tflops: float = TFLOPS, vae_ms: float = VAE_MS) -> Iterator[str]:
    """All tables as Markdown, section by section: measurements, then projections.

    Args:
        stage_times: JSON of stage times measured on one device (see `hiar_model.schedule.costs.measured`). None: both
            models at `tflops` TFLOP/s.
        vae_ms: milliseconds to decode a block, where the stage times do not have it.
    """
    all_machines = machines(stage_times, tflops, vae_ms)
    denoise = all_machines[0].costs.denoise
    steps = STEPS if isinstance(denoise, CostCurve) else (len(denoise),)
    about = "Projections of the simulator, not measured on several GPUs."
    sections: list[tuple[str, Callable[[], list[str]]]] = [
        ("# Rollouts measured on one GPU", gpu_tables.rollout_table),
        ("## Where the time of a task goes, ms", gpu_tables.breakdown_table),
        ("# Steps over ranks", lambda: [about]),
        ("## Steady state, every task 1", partial(limit_table, steps)),
        ("## Gain over one rank block-first, every task 1", partial(gain_table, unit_costs(), steps)),
    ]
    for machine in all_machines:
        where = f"{machine.name}, {machine.link.name}"
        if 4 in steps:
            sections.append(
                (f"## Strategies for 27 blocks in 4 steps: {where}", partial(_with_notes, setup_table, machine))
            )
        if machine.link is all_machines[0].link:  # the link hardly matters to a pipeline, see the table of links

            def gains(machine: Machine) -> list[str]:
                return gain_table(machine.costs, steps, frames_per_block=machine.geometry.frames_per_block)

            name = f"## Gain over one GPU block-first: {where}"
            sections.append((name, partial(_with_notes, gains, machine)))
    if 4 in steps:
        sections.append(("## Gain of 27 blocks in 4 steps, by link", partial(link_table, all_machines)))
    sections.append(("## Link speed above which context parallelism is faster", partial(crossing_table, steps=steps)))
    sections.append(("## Caches on one GPU, GiB", memory_table))
    for title, make in sections:
        yield "\n".join([title, "", *make(), ""])


def _with_notes(table: Callable[[Machine], list[str]], machine: Machine) -> list[str]:
    return [*table(machine), "", *machine.assumptions()]


MEASURED = ("blocks", "order", "strategy", "steps per rank", "seconds", "speedup", "first block s", "then every s",
            "prompt s", "fps without VAE", "fps with VAE*", "simulator s")  # fmt: skip


def measured_table(results: Mapping[str, Any]) -> list[str]:
    """Markdown table of bench/rollout/test_four_step_speedup.py; speedups are over block-first on one rank.

    Args:
        results: its JSON, {"environment", "rows"}.
    """
    about, rows = results["environment"], results["rows"]
    base = {row["blocks"]: row["seconds"] for row in rows if (row["order"], row["way"]) == ("block_first", "alone")}
    lines = ["| " + " | ".join(MEASURED) + " |", "|" + "---|" * 4 + "---:|" * (len(MEASURED) - 4)]
    for row in rows:
        strategy = row["way"] if row["ranks"] == 1 else f"{row['way']} of {row['ranks']}"
        speedup = (row["ranks"] if row["way"] == "replicas" else 1) * base[row["blocks"]] / row["seconds"]
        numbers = (row["seconds"], speedup, row["first_block"], row["interval"], row["prompt"], row["fps"])
        cells = [str(row["blocks"]), row["order"], strategy + ("" if row["measured"] else ", projected")]
        cells.append("+".join(map(str, row["split"])) if row["way"] == "pipeline" else "")
        cells += ["" if n is None else f"{n:.3g}" for n in (*numbers, row.get("fps_vae"), row["predicted"])]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Speedup over block_first on one rank with as many blocks, for replicas in videos per second; without the VAE.",
        "*: simulated, assuming 312 ms of VAE decoding per block on the last rank.",
        "",
    ]
    return lines + [f"- {key}: {value}" for key, value in about.items() if "visit_s" not in key]


def main() -> None:
    """Print the report."""
    from argparse import ArgumentParser

    parser = ArgumentParser(description="Simulated speedups on several GPUs.")
    parser.add_argument("--stage-times", help="JSON of measured stage times; default: the roofline")
    parser.add_argument("--tflops", type=float, default=TFLOPS, help="of the roofline, TFLOP/s")
    parser.add_argument("--vae-ms", type=float, default=VAE_MS, help="milliseconds to decode a block")
    parser.add_argument("--plot", help="instead: plot the speedups into this .png")
    a = parser.parse_args()
    if a.plot is not None:
        draw_gains(a.plot)
        return
    for section in report(a.stage_times, a.tflops, a.vae_ms):
        print(section, flush=True)


if __name__ == "__main__":
    script(main)
