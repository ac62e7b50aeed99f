"""Commands on several processes: how they are started, joined and ended, and `verify-parity`."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace

from ..common import environment
from .choices import as_typed

if TYPE_CHECKING:
    from ..config import ExecutionConfig
    from ..distributed.watchdog import Watch

FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130
KEPT = ".blocks"  # behind the name of the output: the folder of an unfinished run


def pipeline_arguments(parser: ArgumentParser, nproc: int = 1) -> None:
    """How the steps live on processes; shared by `generate` and `verify-parity`."""
    parser.add_argument("--nproc", type=int, default=nproc, help="processes to start here, as torchrun does")
    parser.add_argument("--cuda-graph", type=bool, default=False, help="capture forwards as CUDA graphs")
    parser.add_argument(
        "--parallel",
        type=str,
        help="pipeline: the processes share the steps; ulysses: they share every forward by attention heads; default: "
        "pipeline where there are several",
    )
    parser.add_argument(
        "--steps-per-rank",
        type=list[int] | Literal["count", "measured"],
        default="count",
        help="such as [1,1,2]; count: as even as it gets; measured: by the time that tasks take here",
    )
    parser.add_argument(
        "--fuse-cache-denoise",
        type=bool | Literal["measured"],
        default=False,
        help="fuse each cache task with the next denoise task; measured: if that is faster here (pipeline)",
    )
    parser.add_argument("--dedicated-decoder-rank", action="store_true", help="the last process only decodes")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds in which a fault of a process ends all")


def keeping_arguments(parser: ArgumentParser) -> None:
    """What is kept of a run on processes."""
    parser.add_argument(
        "--resume", action="store_true", help=f"go on from what an interrupted pipeline left in OUT{KEPT}"
    )
    parser.add_argument(
        "--checkpoint-every", type=int, default=10, help="blocks between two states to resume from; 0: none"
    )


def kept_blocks(out: str) -> str:
    """What is left of an unfinished video, and how it goes on; nothing where nothing is."""
    folder = Path(out.rstrip("/") + KEPT)
    blocks = len([*folder.glob("block_*.safetensors")])
    return f"{blocks} finished blocks are kept in {folder}, --resume goes on" if blocks else ""


def launch(argv: Sequence[str], nproc: int, out: str | None = None) -> int:
    """Run this command in so many processes, as torchrun would; returns the exit code. ``out``: of a video."""
    import logging
    import uuid

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    logging.disable()  # the launcher's own account of a failure: the processes tell it in one line
    with tempfile.TemporaryDirectory() as folder:
        printed = Path(folder) / "printed"
        try:
            with environment.for_children(printed):
                elastic_launch(config, sys.executable)("-u", "-m", "hiar_model", *argv)
            return 0
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if not printed.exists():
                print(f"hiar: rank {rank} ended with code {failure.exitcode} before it could say why", file=sys.stderr)
            return failure.exitcode if failure.exitcode > 0 else FAILED
        except (SignalException, KeyboardInterrupt):
            left = "" if out is None else kept_blocks(out)
            print("; ".join(["hiar: interrupted", *filter(None, [left])]), file=sys.stderr)
            return INTERRUPTED
        finally:
            logging.disable(logging.NOTSET)


@dataclass
class Job:
    """This process among those of the job. `watch`: None where it is alone."""

    ranks: int
    watch: Watch | None

    def execution(self, a: Namespace) -> ExecutionConfig:
        """Where a video runs, from the command line."""
        from ..config import ExecutionConfig

        pipelined = a.parallel == "pipeline" or (a.parallel is None and self.ranks > 1)
        if a.fuse_cache_denoise == "measured" and not pipelined:
            raise ValueError(
                "--fuse-cache-denoise measured is for a pipeline: give true or false, or --parallel pipeline"
            )
        mesh = None
        if self.ranks > 1 or a.parallel == "ulysses":
            from ..distributed.mesh import make_mesh

            mesh = make_mesh(step=self.ranks) if pipelined else make_mesh(head=self.ranks)
        split = tuple(a.steps_per_rank) if isinstance(a.steps_per_rank, list) and pipelined else None
        return ExecutionConfig(
            cuda_graph=a.cuda_graph,
            mesh=mesh,
            steps_per_rank=split,
            dedicated_decoder_rank=a.dedicated_decoder_rank,
            kv_dtype=a.get("kv_dtype"),
            on_nan=a.get("on_nan") or "stop",
            timeout=a.timeout,
            watchdog=self.watch,
        )


@contextmanager
def job(a: Namespace, kept: str | None = None) -> Iterator[Job]:
    """Join the processes that were started with this one; what goes wrong in any of them is told once.

    Args:
        a: of the command; "device" becomes this process's own. kept: folder that holds what a fault leaves.
    """
    if a.nproc < 1:
        raise ValueError(f"nproc must be at least 1, got {a.nproc}")
    world = environment.world_size()
    if world == 1:
        yield Job(1, None)
        return
    import torch.distributed as dist

    from ..distributed.pipeline import init_distributed
    from ..distributed.watchdog import PipelineFault, Watch

    def advice(finished: int) -> str:
        if (file := environment.error_file()) is not None:
            file.touch()
        return f"; {finished} finished blocks are kept in {kept}, --resume goes on" if kept and finished else ""

    a.device, missing = _own_device(a.device)
    init_distributed("cuda" if a.device.startswith("cuda") else "cpu")
    code = 0
    with Watch(dist.group.WORLD, a.timeout, advice) as watch:  # type: ignore[arg-type]
        try:
            if missing:
                raise ValueError(missing)
            if a.nproc not in (1, world):
                raise ValueError(f"nproc is {a.nproc}, but torchrun started {world} processes: give one")
            yield Job(world, watch)
        except SystemExit as error:
            code = int(error.code or 0)
        except KeyboardInterrupt:
            code = INTERRUPTED
        except PipelineFault:
            code = FAILED
        except (ValueError, OSError) as error:
            code = WRONG_INPUT
            watch.tell(as_typed(str(error), vars(a)))
        except FloatingPointError as error:
            code = FAILED
            watch.tell(str(error))
        except BaseException as error:
            if a.get("debug"):
                raise
            code = FAILED
            watch.failed(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an ordinary exit tears down torch's links in an order that may abort the process


def _own_device(asked: str) -> tuple[str, str]:
    """The device of this process, and what is wrong with it: each has a GPU of its own."""
    import torch

    if asked not in ("auto", "cuda") or not torch.cuda.is_available():
        return asked, ""
    local, count = environment.local_rank(), torch.cuda.device_count()
    if local >= count:
        return "cpu", f"{local + 1} processes on this machine need a CUDA device each, it has {count}"
    torch.cuda.set_device(local)
    return f"cuda:{local}", ""


# hiar verify-parity


def parity_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("prompt", type=str, nargs="?", default="a red circle moving right", help="of the video")
    parser.add_argument("--model", type=str, default="toy", help="name of a shipped model, or a folder")
    parser.add_argument("--num-frames", type=int, help="pixel frames; default: what the model says")
    parser.add_argument("--seed", type=int, default=0, help="of all noise")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the model's own")
    parser.add_argument("--tolerance", type=float, default=0.0, help="difference that is still accepted")
    pipeline_arguments(parser, nproc=2)
    parser.add_argument("--device", type=str, default="auto", help="auto (CUDA if there is any), cpu, cuda")
    parser.add_argument("--dtype", type=str, help="float32, bfloat16, float16 or float64")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch, in each process")


def verify_parity(a: Namespace) -> None:
    """The same video on the job's processes and on one: print the largest difference of their latents.

    Raises:
        FloatingPointError: it is larger than the tolerance.
    """
    if not a.tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {a.tolerance}")
    with job(a) as here:
        import torch

        from ..config import ExecutionConfig
        from ..models.registry import load_video_model
        from ..pipelines.measured import measured
        from ..pipelines.video_pipeline import VideoOptions, VideoPipeline

        torch.set_num_threads(a.threads)
        model = load_video_model(a.model, a.device, a.dtype)
        fuse = a.fuse_cache_denoise
        options = VideoOptions(
            a.prompt, num_frames=a.num_frames, seed=a.seed, steps=a.steps, order="stream",
            fuse_cache_denoise=False if fuse == "measured" else fuse,
        )  # fmt: skip
        execution = here.execution(a)
        if execution.mesh is None and execution.steps_per_rank is None:
            execution = replace(execution, steps_per_rank=(a.steps or len(model.rollout.steps),))
        if "measured" in (a.steps_per_rank, fuse):
            execution, options = measured(model, execution, options, choose_fusion=fuse == "measured")

        def blocks(execution: ExecutionConfig) -> tuple[Any, list[Any]]:
            run = VideoPipeline(model, execution).prepare(options)
            return run, [block.latents for block in run.rollout]

        run, made = blocks(execution)
        if not run.makes_frames:
            return
        pipeline = run.rollout.pipeline
        shared = "+".join(map(str, pipeline.stage.split)) + " steps" if pipeline else f"parallel={a.parallel}"
        del run
        expected = blocks(ExecutionConfig(cuda_graph=execution.cuda_graph))[1]
        difference = max(float((x.double() - y.double()).abs().max()) for x, y in zip(made, expected, strict=True))
        same = all(torch.equal(x, y) for x, y in zip(made, expected, strict=True))
        told = "the same bits" if same else f"largest difference {difference:.3g}"
        where = f"{model.device}, {str(model.dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads"
        print(
            f"{len(made)} blocks of {model.name} ({model.weights_sha256[:12]}) on {here.ranks} processes "
            f"({shared}) and on one ({where}): {told}"
        )
        if not difference <= a.tolerance:  # nan is a difference too
            raise FloatingPointError(f"latents differ by {difference:.3g}, tolerance is {a.tolerance:g}")
