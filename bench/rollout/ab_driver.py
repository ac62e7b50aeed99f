"""One revision's side of bench/rollout/ab.py: prepares a case and measures it on request.

A process of its own with that revision on PYTHONPATH. It reads one JSON request a line from stdin and answers each with
one line. The file is this checkout's for both revisions, so it uses nothing that only one of them has, or looks first.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    del sys.path[0]  # nothing of this checkout beside the revision's

import torch

CUDA = torch.cuda.is_available()
PIXEL_FRAMES = 4  # of a latent frame


def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def module_of(*names: str) -> Any:
    """The first of these modules that this revision has; None: it has none of them.

    By their files: an editable install of another checkout would answer for a name that this revision lacks.
    """
    for name in names:
        package, _, module = name.partition(".")
        folder = Path(str(importlib.import_module(package).__file__)).parent
        if (folder / f"{module.replace('.', '/')}.py").is_file():
            return importlib.import_module(name)
    return None


@functools.cache
def weights(name: str, layers: int | None, dtype: str) -> tuple[Any, Any]:
    """A model and an encoded prompt, both random."""
    from hiar_model import HiARTransformer, WanConfig

    values = WanConfig.from_name(name).to_dict()
    config = WanConfig.from_dict({**values, **({"num_layers": layers} if layers else {})})
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device("cuda" if CUDA else "cpu"):
            torch.manual_seed(0)
            return HiARTransformer(config).eval().requires_grad_(False), torch.randn(
                1, config.text_len, config.text_dim
            )
    finally:
        torch.set_default_dtype(before)


class RolloutCase:
    """An endless rollout with random weights, its window full and its graphs captured."""

    def __init__(self, case: dict[str, Any]) -> None:
        import hiar_model

        # Rollout itself took plain keywords once
        make_rollout = getattr(module_of("hiar_model.rollout.flat"), "make_rollout", hiar_model.Rollout)
        begun = now()
        model, prompt = weights(case["model"], case["layers"], case["dtype"])
        c = model.config
        size = c.position_grid and tuple(n * p for n, p in zip(c.position_grid, c.patch_size[1:]))
        height, width = size or (case["height"] // 8, case["width"] // 8)  # Wan's VAE makes 8 x 8 pixels one
        self.rollout = make_rollout(
            model, prompt, hiar_model.FlowSchedule(), num_frames=None, height=height, width=width, order=case["order"],
            window_frames=case["window"], executor=case["executor"], pairs=case["pairs"],
            cache_source="next_step" if case["shared_keys"] else "own",
        )  # fmt: skip
        self.case, self.layers, self.blocks = case, c.num_layers, iter(self.rollout)
        self.executor = getattr(self.rollout, "_executor", None) or self.rollout.executor
        built = now()
        self.fill()
        self.prepared = {"build_s": built - begun, "fill_s": now() - built, "captures": self.count("captures")}
        if CUDA:
            torch.cuda.reset_peak_memory_stats()

    def fill(self) -> None:
        """To a full window. Graphs are captured only then, where a revision lets us put that off: half of the kinds
        of forward occur while the window grows, and nobody measures those.
        """
        capture = getattr(self.executor, "capture", None)
        if capture is not None:
            self.executor.capture = None
        elif "warm_up" in dir(self.rollout) and self.case["executor"] != "eager":
            self.rollout.warm_up()
        per_block = self.rollout.plan.frames_per_block
        while next(self.blocks).first_frame + per_block < self.case["window"]:
            pass
        if capture is not None:
            self.executor.capture = capture
        for _ in range(12):  # blocks, until one of them is replayed whole
            before = self.count("captures")
            next(self.blocks)
            if self.count("captures") == before:
                return

    def count(self, name: str) -> int | None:
        return getattr(getattr(self.executor, "counters", None), name, None)

    def run(self, blocks: int) -> dict[str, Any]:
        """Tasks (visits in older revisions: forwards of one block) and batched forwards that these blocks took."""
        tasks, forwards = self.rollout.forwards_done, self.count("launches")
        for _ in range(blocks):
            next(self.blocks)
        done = None if forwards is None else self.count("launches") - forwards
        return {"tasks": self.rollout.forwards_done - tasks, "forwards": done}

    def measure(self) -> dict[str, Any]:
        begun = now()
        work = self.run(self.case["blocks"])
        seconds = now() - begun
        frames = PIXEL_FRAMES * self.rollout.plan.frames_per_block * self.case["blocks"]
        peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else None
        return {"task_ms": 1e3 * seconds / work["tasks"], "fps": frames / seconds, "peak_gib": peak}

    def trace(self) -> dict[str, Any]:
        """One block under torch's profiler: what ran on the device and when, and what the host called."""
        # torch.profiler.profile is this one, and imports torch's compiler first: a second of a CPU.
        with torch.autograd.profiler.profile(use_device="cuda" if CUDA else None) as profiler:
            work = self.run(1)
            now()
        seconds: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        host: Counter[str] = Counter()
        spans = []
        for event in profiler.function_events or []:
            if event.device_type == torch.autograd.DeviceType.CUDA:
                if getattr(event, "is_user_annotation", False):
                    continue
                spans.append((event.time_range.start, event.time_range.end))
                microseconds = event.time_range.elapsed_us()
            else:
                host[event.name] += 1
                if CUDA or not event.name.startswith(("aten::", "hiar::")):
                    continue
                microseconds = event.self_cpu_time_total
            seconds[event.name] += microseconds / 1e6
            counts[event.name] += 1
        device = [[name, seconds[name], counts[name]] for name in seconds]
        return {**work, "layers": self.layers, "device": device, "spans": spans, "host": host}


class OpCase:
    """One variant of an op, as bench/ops/bench_ops.py runs it; its cases are those of the revision."""

    def __init__(self, case: dict[str, Any]) -> None:
        names = ["bench.lib.measure", "bench.ops.work", "bench.ops.op_cases"]
        folder = Path(case["folder"]) / "bench"
        if not (folder / "ops").is_dir():  # a revision whose bench/ was flat
            names = [name.rpartition(".")[2] for name in names]
            if str(folder) not in sys.path:
                sys.path.insert(0, str(folder))
        measure, work, cases = map(importlib.import_module, names)
        bench = measure.Bench("cuda" if CUDA else "cpu", (8, 40) if CUDA else (3, 3), 0.2)
        ops = {op.label: op for op in cases.table(bench, {})}
        if case["op"] not in ops:
            raise ValueError(f"op must be one of {', '.join(ops)}, got {case['op']!r}")
        op, variant = ops[case["op"]], case["variant"]
        variants = op.variants if hasattr(op, "variants") else op.ways
        if op.unit != "flop" and variant not in variants:  # attention takes every impl of the dispatcher, "auto" too
            raise ValueError(f"{case['op']} has no variant {variant!r} here; it has {', '.join(variants)}")
        torch.manual_seed(0)
        inputs = op.make(bench, work.Sizes() if CUDA else work.SMALL)
        self.bench, self.run = bench, self.prepared_run(inputs, variant, case["direction"])
        self.run()
        self.prepared: dict[str, Any] = {}

    @staticmethod
    def prepared_run(work: Any, variant: str, direction: str) -> Any:
        if direction == "forward":
            return torch.no_grad()(lambda: work.run(variant))
        for x in work.inputs:
            x.requires_grad_()
        outs = work.run(variant)
        outs = [outs] if isinstance(outs, torch.Tensor) else list(outs)
        grads = [torch.randn(o.shape, generator=torch.Generator().manual_seed(i)).to(o) for i, o in enumerate(outs)]
        return lambda: torch.autograd.grad(outs, work.inputs, grads, retain_graph=True)

    def measure(self) -> dict[str, Any]:
        times = self.bench.milliseconds(self.run)
        return {"ms": times[len(times) // 2]}


def about() -> dict[str, Any]:
    """Where the packages come from, and what decides how they run."""
    import hiar_kernels
    import hiar_model

    loader = module_of("hiar_kernels.common.cuda_loader", "hiar_kernels._cuda")
    cuda_ops = loader.missing() if hasattr(loader, "missing") else "unknown"
    return {
        "packages": [str(Path(str(m.__file__)).resolve().parents[1]) for m in (hiar_kernels, hiar_model)],
        "threads": torch.get_num_threads(),
        "csrc": "built" if cuda_ops is None else "not built",
    }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints
    gc.freeze()  # nothing that was imported is garbage: "drop" need not look through it
    case: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        result: Any = {}
        try:
            if request["do"] == "about":
                result = about()
            elif request["do"] == "drop":
                case = None
                gc.collect()  # a rollout and its executor know each other
                if CUDA:
                    torch.cuda.empty_cache()
            elif request["do"] == "prepare":
                case = (RolloutCase if request["case"]["kind"] == "rollout" else OpCase)(request["case"])
                result = case.prepared
            else:
                result = getattr(case, request["do"])()
            answer = {"result": result}
        except Exception as error:  # the other side is waiting for an answer
            line = next(iter(str(error).strip().splitlines()), "")
            answer = {"error": f"{type(error).__name__}: {line}"[:400]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
