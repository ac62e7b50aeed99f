"""One revision's side of bench/ab.py: prepares a case and measures it whenever it is told to.

A process of its own with that revision on PYTHONPATH. It reads one JSON request a line from stdin and answers each with
one line. The file is this checkout's for both revisions, so it uses nothing that only one of them has, or looks first.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    del sys.path[0]  # bench/ of this checkout, not of the revision

import torch

CUDA = torch.cuda.is_available()
PIXEL_FRAMES = 4  # of a latent frame


def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


class RolloutCase:
    """An endless rollout with random weights, its window full and its graphs captured; the weights are made once."""

    models: ClassVar[dict[str, tuple[Any, Any]]] = {}

    def __init__(self, case: dict[str, Any]) -> None:
        from hiar_model.models.flow_schedule import FlowSchedule
        from hiar_model.rollout import Rollout

        begun = now()
        model, prompt = self.weights(case)
        c = model.config
        size = c.position_grid and tuple(n * p for n, p in zip(c.position_grid, c.patch_size[1:]))
        height, width = size or (case["height"] // 8, case["width"] // 8)  # Wan's VAE makes 8 x 8 pixels one
        legal = inspect.signature(Rollout.__init__).parameters
        options = {
            "kv_source" if "kv_source" in legal else "cache_source": "next_step" if case["shared_keys"] else "own",
            "fuse_cache_denoise" if "fuse_cache_denoise" in legal else "pairs": case["pairs"],
        }
        self.rollout = Rollout(
            model, prompt, FlowSchedule(), num_frames=None, height=height, width=width, order=case["order"],
            window_frames=case["window"], executor=case["executor"], **options,
        )  # fmt: skip
        self.case, self.layers, self.blocks = case, c.num_layers, iter(self.rollout)
        self.executor = self.rollout.executor
        built = now()
        self.fill()
        self.prepared = {"build_s": built - begun, "fill_s": now() - built, "captures": self.count("captures")}
        if CUDA:
            torch.cuda.reset_peak_memory_stats()

    @classmethod
    def weights(cls, case: dict[str, Any]) -> tuple[Any, Any]:
        from hiar_model.config import WanConfig
        from hiar_model.models.transformer import HiARTransformer

        key = json.dumps([case[name] for name in ("model", "layers", "dtype")])
        if key not in cls.models:
            values = WanConfig.from_name(case["model"]).to_dict()
            config = WanConfig.from_dict({**values, **({"num_layers": case["layers"]} if case["layers"] else {})})
            before = torch.get_default_dtype()
            torch.set_default_dtype(getattr(torch, case["dtype"]))
            try:
                with torch.device("cuda" if CUDA else "cpu"):
                    torch.manual_seed(0)
                    model = HiARTransformer(config).eval().requires_grad_(False)
                    cls.models[key] = model, torch.randn(1, config.text_len, config.text_dim)
            finally:
                torch.set_default_dtype(before)
        return cls.models[key]

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
        """Tasks (forwards of one block, visits in older revisions) and batched forwards that these blocks took."""
        tasks, forwards = self.rollout.forwards_done, self.count("launches")
        for _ in range(blocks):
            next(self.blocks)
        done = None if forwards is None else self.count("launches") - forwards
        return {"tasks": self.rollout.forwards_done - tasks, "forwards": done}

    def measure(self) -> dict[str, Any]:
        begun = now()
        found = self.run(self.case["blocks"])
        seconds = now() - begun
        frames = PIXEL_FRAMES * self.rollout.plan.frames_per_block * self.case["blocks"]
        peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else None
        return {"task_ms": 1e3 * seconds / found["tasks"], "fps": frames / seconds, "peak_gib": peak}

    def trace(self) -> dict[str, Any]:
        """One block under torch's profiler: what ran on the device and when, and what the host called."""
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
        with profile(activities=activities) as profiler:
            found = self.run(1)
            now()
        seconds: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        host: Counter[str] = Counter()
        spans = []
        for event in profiler.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                if getattr(event, "is_user_annotation", False):
                    continue
                spans.append((event.time_range.start, event.time_range.end))
                taken = event.time_range.elapsed_us()
            else:
                host[event.name] += 1
                if CUDA or not event.name.startswith(("aten::", "hiar::")):
                    continue
                taken = event.self_cpu_time_total
            seconds[event.name] += taken / 1e6
            counts[event.name] += 1
        device = [[name, seconds[name], counts[name]] for name in seconds]
        return {**found, "layers": self.layers, "device": device, "spans": spans, "host": host}


class OpCase:
    """One op by one way, as bench/bench_ops.py runs it; its cases are those of the revision."""

    def __init__(self, case: dict[str, Any]) -> None:
        folder = str(Path(case["folder"]) / "bench")
        if folder not in sys.path:
            sys.path.insert(0, folder)
        bench = importlib.import_module("measure").Bench("cuda" if CUDA else "cpu", (8, 40) if CUDA else (3, 3), 0.2)
        work, cases = importlib.import_module("work"), importlib.import_module("op_cases")
        ops = {op.label: op for op in cases.table(bench, {})}
        if case["op"] not in ops:
            raise ValueError(f"op must be one of {', '.join(ops)}, got {case['op']!r}")
        op, way = ops[case["op"]], case["way"]
        if op.unit == "flop" or way in op.ways:  # attention takes every impl of the dispatcher, "auto" too
            torch.manual_seed(0)
            done = op.make(bench, work.Sizes() if CUDA else work.SMALL)
            self.bench, self.run = bench, self.prepared_run(done, way, case["direction"])
            self.run()
            self.prepared: dict[str, Any] = {}
        else:
            raise ValueError(f"{case['op']} has no way {way!r} here; it has {', '.join(op.ways)}")

    @staticmethod
    def prepared_run(work: Any, way: str, direction: str) -> Any:
        if direction == "forward":

            def forward() -> Any:
                with torch.no_grad():
                    return work.run(way)

            return forward
        for x in work.inputs:
            x.requires_grad_()
        outs = work.run(way)
        outs = [outs] if isinstance(outs, torch.Tensor) else list(outs)
        grads = [torch.randn(o.shape, generator=torch.Generator().manual_seed(i)).to(o) for i, o in enumerate(outs)]
        return lambda: torch.autograd.grad(outs, work.inputs, grads, retain_graph=True)

    def measure(self) -> dict[str, Any]:
        taken = self.bench.milliseconds(self.run)
        return {"ms": taken[len(taken) // 2]}


def about() -> dict[str, Any]:
    """Where the packages come from, and what decides how they run."""
    import hiar_kernels
    import hiar_model

    try:
        cuda_ops = importlib.import_module("hiar_kernels._cuda").missing()
    except (ImportError, AttributeError):
        cuda_ops = "unknown"
    return {
        "packages": [str(Path(str(m.__file__)).resolve().parents[1]) for m in (hiar_kernels, hiar_model)],
        "threads": torch.get_num_threads(),
        "csrc": "built" if cuda_ops is None else "not built",
    }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints
    case: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        found: Any = {}
        try:
            if request["do"] == "about":
                found = about()
            elif request["do"] == "drop":
                case = None
                gc.collect()  # a rollout and its executor know each other
                if CUDA:
                    torch.cuda.empty_cache()
            elif request["do"] == "prepare":
                case = (RolloutCase if request["case"]["kind"] == "rollout" else OpCase)(request["case"])
                found = case.prepared
            else:
                found = getattr(case, request["do"])()
            answer = {"found": found}
        except Exception as error:  # the other side is waiting for an answer
            said = [line.strip() for line in str(error).splitlines() if line.strip()]
            answer = {"error": f"{type(error).__name__}: {said[0] if said else ''}"[:400]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
