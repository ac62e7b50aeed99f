"""Results of `hiar bench`: read, compared, as a table and as a picture. `schema.json` describes their JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io.files import refuse_stand_in

if TYPE_CHECKING:
    from rich.table import Table

FORMAT, VERSION = "hiar-bench", 1
SCHEMA = Path(__file__).with_name("schema.json")
PARTS_OF = (
    "model", "rollout", "precision", "execution", "measured", "machine", "versions", "speeds", "plain", "latents",
    "first_block_ms", "memory",
)  # fmt: skip
SAME = {
    "model": ("model", "name"), "layers": ("model", "layers"), "weights": ("model", "weights"),
    "height": ("model", "height"), "width": ("model", "width"), "steps": ("rollout", "steps"),
    "blocks": ("latents", "blocks"),
}  # fmt: skip
"""What two results must have in common to be compared."""
MAY_DIFFER = {
    "device": ("machine", "device"), "driver": ("machine", "driver"), "threads": ("machine", "threads"),
    "weights in": ("precision", "weights"), "keys and values in": ("precision", "kv"),
    "products of attention in": ("precision", "attention"), "linear layers in": ("precision", "linear"),
    "CUDA graphs": ("execution", "cuda_graph"), "hiar-kernels": ("versions", "hiar-kernels"),
    "torch": ("versions", "torch"), "triton": ("versions", "triton"), "cuda": ("versions", "cuda"),
}  # fmt: skip
"""What a comparison may be about, with the options of the rollout."""


def read(path: str | Path) -> dict[str, Any]:
    """A result from a JSON file.

    Raises:
        ValueError: one line: no JSON, no result, or one of another version.
    """
    refuse_stand_in(Path(path))
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f'{path} is no result of hiar bench: it lacks "format": "{FORMAT}"')
    if values.get("version") != VERSION:
        raise ValueError(f"{path} is of version {values.get('version')!r}, this one reads {VERSION}")
    for part in PARTS_OF:
        if part not in values:
            raise ValueError(f"{path} is damaged: {part} is missing")
    try:
        for name, value, unit in figures(values):
            if not isinstance(value, int | float):
                raise ValueError(f"{name} is {value!r}, expected a number of {unit}")
        differences(values, values, {**SAME, **MAY_DIFFER})
        dict(values["rollout"]), values["latents"]["sha256"][:1]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: not as hiar_model/benchmark/schema.json says: {error}") from None
    return values


def _at(result: Mapping[str, Any], path: tuple[str, str]) -> Any:
    return result[path[0]].get(path[1])


def differences(a: Mapping[str, Any], b: Mapping[str, Any], names: Mapping[str, tuple[str, str]]) -> list[str]:
    """ "name: a | b" of each of these values that is not the same."""
    both = ((name, _at(a, path), _at(b, path)) for name, path in names.items())
    return [f"{name}: {x} | {y}" for name, x, y in both if x != y]


def figures(result: Mapping[str, Any]) -> Iterator[tuple[str, float, str]]:
    """(name, value, unit) of all that was measured."""
    first = result["first_block_ms"]
    yield "first block", first["p50"], "ms"
    for speed in result["speeds"]:
        if "fps" in speed:
            name = "latents" if speed["decoder"] == "none" else f"with {speed['decoder']} decoder"
            yield f"{name}: fps", speed["fps"], "fps"
            for p in ("p50", "p90", "p99"):
                yield f"{name}: block {p.upper()}", speed["interval_ms"][p], "ms"
            if speed["device_peak_bytes"] is not None:
                yield f"{name}: peak memory", speed["device_peak_bytes"] / 2**30, "GiB"
    plain = result["plain"]
    if "fps" in plain:
        yield "plain PyTorch: first block", plain["first_block_ms"], "ms"
        yield "plain PyTorch: fps", plain["fps"], "fps"
        yield "plain PyTorch: block P50", plain["interval_ms"]["p50"], "ms"
        if plain["peak_bytes"] is not None:
            yield "plain PyTorch: peak memory", plain["peak_bytes"] / 2**30, "GiB"
    if result["memory"]["host_peak_bytes"] is not None:
        yield "peak memory of the process", result["memory"]["host_peak_bytes"] / 2**30, "GiB"


def facts(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, text) of all that the figures depend on."""
    m, r, about, v = result["model"], result["rollout"], result["machine"], result["versions"]
    latent = "x".join(map(str, m["latent"]))
    yield "model", f"{m['name']}, {m['layers']} layers, {m['parameters']:,} parameters, weights: {m['weights']}"
    yield "size", f"{m['height']}x{m['width']} pixels, latents {latent}, {m['frames_per_block']} frames a block"
    options = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in r.items() if name != "steps")
    yield (
        "rollout",
        f"{len(r['steps'])} steps, {result['measured']['forwards_per_block']:g} forwards a block; {options}",
    )
    p, e = result["precision"], result["execution"]
    how = "CUDA graphs" if e["cuda_graph"] else "eager"
    dtypes = f"weights {p['weights']}, keys and values {p['kv']}, linear layers {p['linear']}"
    products = f" in {p['attention']}" if p.get("attention", p["weights"]) != p["weights"] else ""
    yield "precision", f"{dtypes}; {how}, attention{products} {e['attention_impl']}"
    threads = f", threads: {about['threads']}" if about["kind"] == "cpu" else f", driver {about['driver']}"
    yield "machine", f"{about['device']}{threads}, {about['system']}"
    yield "versions", ", ".join(f"{name} {value}" for name, value in v.items() if value != "absent")
    n = result["measured"]
    before = f"after {n['blocks_before']} that fill the window"
    yield "measured", f"{n['repeats']} rollouts; in each {n['blocks']} blocks a decoder, {before}"
    yield "included", "; ".join(result["included"])
    yield "not included", "; ".join(result["not_included"])
    cold = result["cold_start"]
    yield (
        "cold start",
        (
            f"loading {cold['load_s']:.1f} s, first run of {cold['kinds_of_forwards']} kinds of forwards "
            f"{cold['warm_up_s']:.1f} s"
        ),
    )
    yield "clocks", clocks(result["clocks"])
    latents = result["latents"]
    same = "same in all repeats" if latents["same_in_all_repeats"] else "NOT THE SAME IN ALL REPEATS"
    yield "latents", f"sha256 {latents['sha256']} of {latents['blocks']} blocks in {latents['dtype']}, {same}"


def clocks(sampled: Mapping[str, Any]) -> str:
    """What was sampled while the rollouts ran, or why nothing was."""
    if "absent" in sampled:
        return str(sampled["absent"])
    units = {"mhz": "MHz", "watts": "W", "celsius": "degrees C"}
    values = [
        f"{sampled[name]['median']:.0f} [{sampled[name]['min']:.0f}, {sampled[name]['max']:.0f}] {unit}"
        for name, unit in units.items()
        if name in sampled
    ]
    return f"{', '.join(values)}: median [least, most] of {sampled['samples']} samples ({sampled['source']})"


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """What the figures depend on, the figures, and where the time of a task goes, for rich's console."""
    from rich.text import Text

    about = _table()
    about.add_column(style="bold", no_wrap=True)
    about.add_column(overflow="fold")
    for name, text in facts(result):
        about.add_row(name, Text(text))  # no markup: it may hold brackets
    yield about
    yield _speeds(result)
    if "parts" in result:
        yield _parts(result["parts"])


def _table(*headings: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD if headings else None, show_header=bool(headings), pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=i > 0)
    return table


def _gib(count: int | None) -> str:
    return "" if count is None else f"{count / 2**30:.2f}"


def _speeds(result: Mapping[str, Any]) -> Table:
    table = _table("decoder", "fps", "block ms P50", "P90", "P99", "first block ms", "peak GiB")
    first = f"{result['first_block_ms']['p50']:.4g}"
    for speed in result["speeds"]:
        if "absent" in speed:
            continue
        name = "none: latents only" if speed["decoder"] == "none" else f"{speed['decoder']}: {speed['description']}"
        times = [f"{speed['interval_ms'][p]:.4g}" for p in ("p50", "p90", "p99")]
        begin = first if speed["decoder"] == "none" else ""
        table.add_row(name, f"{speed['fps']:.4g}", *times, begin, _gib(speed["device_peak_bytes"]))
    plain = result["plain"]
    if "fps" in plain:
        times = [f"{plain['interval_ms'][p]:.4g}" for p in ("p50", "p90", "p99")]
        ends = f"{plain['first_block_ms']:.4g}", _gib(plain["peak_bytes"])
        table.add_row("none, in plain PyTorch", f"{plain['fps']:.4g}", *times, *ends)
    return table


def _parts(parts: Mapping[str, Any]) -> Table:
    table = _table("part of a task", "ms", "share", "kernels", "limit ms", "of limit", "limit is")
    for part in parts["parts"]:
        limit = ("", "")
        if part["limit"] and part["seconds"]:
            limit = f"{1e3 * part['limit']:.3f}", f"{part['limit'] / part['seconds']:.0%}"
        share = f"{part['seconds'] / parts['seconds']:.0%}"
        table.add_row(
            part["name"], f"{1e3 * part['seconds']:.3f}", share, f"{part['kernels']:.0f}", *limit, part["why"]
        )
    return table


def notes(result: Mapping[str, Any]) -> Iterator[str]:
    """Sentences below the tables."""
    for speed in result["speeds"]:
        if "absent" in speed:
            yield f"decoder {speed['decoder']}: not measured: {speed['absent']}"
    plain = result["plain"]
    if "speedup" in plain:
        yield (
            f"{plain['speedup']:.2f} times the fps of {plain['implementation']}; both without decoding, the same "
            f"weights and noise, in this run; latents differ by at most {plain['largest_difference']:.2g}"
        )
    else:
        yield f"plain PyTorch: not measured: {plain['absent']}"
    host = result["memory"]["host_peak_bytes"]
    if host is not None:
        yield f"peak memory of the process on the host, libraries included: {host / 2**30:.2f} GiB"
    if (parts := result.get("parts")) is not None:
        limits = parts["limits"]
        yield (
            f"limits of this machine in this run: matmul {limits['flop'] / 1e12:.4g} TFLOP/s, "
            f"copy {limits['bytes'] / 1e9:.4g} GB/s"
        )
        for name, value in (("kernel or graph launches", parts["launches"]), ("host syncs", parts["syncs"])):
            yield f"{name} a task: " + ("not counted on a CPU" if value is None else f"{value:.2f}")


def draw(result: Mapping[str, Any], picture: str | Path) -> None:
    """Draw frames per second by decoder, the time of each block and, if measured, of each part of a task: a .png."""
    from ..io.plot import Bar, Bars, Lines, Series, save_plot

    m, measured = result["model"], [speed for speed in result["speeds"] if "fps" in speed]
    bars = [Bar("latents only" if s["decoder"] == "none" else s["decoder"], s["fps"]) for s in measured]
    if "fps" in result["plain"]:
        bars.append(Bar("plain PyTorch", result["plain"]["fps"]))
    lines = []
    for speed in measured:
        values = speed["intervals_ms"]
        name = "latents only" if speed["decoder"] == "none" else f"decoder: {speed['decoder']}"
        lines.append(Series(name, range(1, len(values) + 1), values))
    panels: list[Any] = [
        Bars(f"{m['name']} {m['height']}x{m['width']}, {result['machine']['device']}", bars, "fps"),
        Lines("time between blocks", lines, "block measured", "ms", y_range=(0, 0), points=True),
    ]
    if "parts" in result:
        parts = result["parts"]
        panels.append(
            Bars(
                f"{1e3 * parts['seconds']:.4g} ms a task",
                [
                    Bar(p["name"], 1e3 * p["seconds"], 1e3 * p["limit"], f"{p['seconds'] / parts['seconds']:.0%}")
                    for p in parts["parts"]
                ],
                "ms",
                "least that the machine's FLOP/s and bytes/s allow",
            )
        )
    save_plot(panels, picture)


def compared(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Table, list[str]]:
    """The figures of two results with their ratios b / a, and lines that say what else is different.

    Raises:
        ValueError: one line: the two are of another model, size, number of steps or of blocks.
    """
    if problems := differences(a, b, SAME):
        raise ValueError(f"not comparable: {'; '.join(problems)}")
    table = _table("figure", "a", "b", "b / a")
    others = {name: value for name, value, _ in figures(b)}
    for name, value, unit in figures(a):
        if name in others:
            ratio = f"{others[name] / value:.3f}" if value else ""
            table.add_row(name, f"{value:.4g} {unit}", f"{others[name]:.4g} {unit}", ratio)
    options = {name.replace("_", " "): ("rollout", name) for name in a["rollout"]}
    lines = [f"different: {line}" for line in differences(a, b, {**MAY_DIFFER, **options})]
    first, second = a["latents"]["sha256"], b["latents"]["sha256"]
    if first == second:
        lines.append(f"the same latents, bit for bit: sha256 {first}")
    else:
        lines.append(
            f"NOT the same latents (sha256 {first[:12]}... and {second[:12]}...): comparable only if rounding is all "
            "that differs, as between devices, dtypes or versions"
        )
    return table, lines
