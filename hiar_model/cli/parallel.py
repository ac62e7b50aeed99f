"""Commands on several processes: starting, joining and ending them, and `verify-parity`."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace

from ..common import environment
from ..common.checks import dtype_name
from .choices import as_typed, rollout_options
from .machine import kv_argument, linear_argument
from .streams import status

if TYPE_CHECKING:
    from ..config import ExecutionConfig
    from ..distributed.watchdog import Watchdog
    from ..models.video_model import VideoModel
    from ..pipelines.video_pipeline import VideoOptions

FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130
AGAIN = "run the command again"
RUN_FOLDER = ".blocks"  # suffix of the output's name: the folder of an unfinished run


def pipeline_arguments(parser: ArgumentParser, nproc: int = 1) -> None:
    """How processes share a video: options of `generate` and `verify-parity`."""
    parser.add_argument("--nproc", type=int, default=nproc, help="processes to start here, as torchrun does")
    parser.add_argument("--cuda-graph", type=bool, default=False, help="capture forwards as CUDA graphs")
    parser.add_argument("--attention-impl", type=str, default="auto", help="of self-attention: auto, sdpa, triton, ...")
    linear_argument(parser)
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
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds until a failed process ends all")


def resume_arguments(parser: ArgumentParser) -> None:
    """Options for resuming a pipeline."""
    parser.add_argument("--resume", action="store_true", help=f"resume an interrupted pipeline from OUT{RUN_FOLDER}")
    parser.add_argument(
        "--checkpoint-every", type=int, default=10, help="blocks between two states to resume from; 0: none"
    )


def unfinished_blocks(out: str) -> str:
    """What an unfinished run has stored, and how to resume it; "" if nothing."""
    folder = Path(out.rstrip("/") + RUN_FOLDER)
    blocks = len([*folder.glob("block_*.safetensors")])
    return f"{blocks} finished blocks are in {folder}, continue with --resume" if blocks else ""


def launch(argv: Sequence[str], nproc: int, out: str | None = None, advice: str = AGAIN) -> int:
    """Run this command in ``nproc`` processes, as torchrun would; returns the exit code. ``out``: of a video. advice:
    what to do after a process was killed, if there is nothing to say of ``out``.
    """
    import logging
    import uuid

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable()  # the processes report a failure in one line, the launcher in many
    with tempfile.TemporaryDirectory() as folder:
        reported = Path(folder) / "reported"
        try:
            with environment.for_children(reported):
                config = LaunchConfig(
                    min_nodes=1,
                    max_nodes=1,
                    nproc_per_node=nproc,
                    run_id=uuid.uuid4().hex,
                    rdzv_backend="c10d",
                    rdzv_endpoint="localhost:0",
                    max_restarts=0,
                )
                elastic_launch(config, sys.executable)("-u", "-m", "hiar_model", *argv)
            return 0
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if not reported.exists():
                left = "" if out is None else unfinished_blocks(out)
                print(f"hiar: rank {rank} {_end(failure.exitcode)}; {left or advice}", file=sys.stderr)
            return failure.exitcode if failure.exitcode > 0 else FAILED
        except (SignalException, KeyboardInterrupt):
            left = "" if out is None else unfinished_blocks(out)
            if left or not reported.exists():
                print("; ".join(["hiar: interrupted", *filter(None, [left])]), file=sys.stderr)
            return INTERRUPTED
        finally:
            logging.disable(logging.NOTSET)


def _end(code: int) -> str:
    """How a process without a message has ended."""
    with suppress(ValueError):
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
    return f"ended with code {code} without a message"


@dataclass
class Job:
    """This process in a job of ``ranks``. ``watchdog``: None if it is the only one."""

    ranks: int
    watchdog: Watchdog | None

    def execution(self, a: Namespace) -> ExecutionConfig:
        """The execution config of the command line."""
        from ..config import ExecutionConfig

        pipelined = a.parallel == "pipeline" or (a.parallel is None and self.ranks > 1)
        if a.fuse_cache_denoise == "measured" and not pipelined:
            raise ValueError("--fuse-cache-denoise must be true or false without --parallel pipeline, got measured")
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
            attention_dtype=a.get("attention_dtype"),
            linear_dtype=a.linear_dtype,
            attention_impl=a.attention_impl,
            on_nan=a.get("on_nan") or "stop",
            timeout=a.timeout,
            watchdog=self.watchdog,
        )


@contextmanager
def job(a: Namespace, folder: str | None = None) -> Iterator[Job]:
    """Join the processes that were started with this one; an error in any of them is reported once.

    Args:
        a: of the command; "device" becomes this process's own. folder: of the run, to name when it fails.
    """
    if a.nproc < 1:
        raise ValueError(f"nproc must be at least 1, got {a.nproc}")
    world = environment.world_size()
    if world == 1:
        yield Job(1, None)
        return
    import torch.distributed as dist

    from ..distributed.pipeline import init_distributed
    from ..distributed.watchdog import PipelineFault, Watchdog

    def advice(finished: int) -> str:
        environment.claim_error_report()
        return f"; {finished} finished blocks are in {folder}, continue with --resume" if folder and finished else ""

    a.device, missing = _own_device(a.device)
    init_distributed("cuda" if a.device.startswith("cuda") else "cpu")
    code = 0
    with Watchdog(dist.group.WORLD, a.timeout, advice) as watchdog:  # type: ignore[arg-type]
        try:
            if missing:
                raise ValueError(missing)
            if a.nproc not in (1, world):
                raise ValueError(f"nproc must be left out under torchrun ({world} processes), got {a.nproc}")
            yield Job(world, watchdog)
        except SystemExit as error:
            code = int(error.code or 0)
        except KeyboardInterrupt:
            code = INTERRUPTED
        except PipelineFault:
            code = FAILED
        except BaseException as error:
            if a.get("debug"):
                traceback.print_exc()
            code = FAILED
            if isinstance(error, ValueError | OSError):
                code = WRONG_INPUT
                watchdog.report(as_typed(str(error), vars(a)))
            elif isinstance(error, FloatingPointError):
                watchdog.report(str(error))
            else:
                watchdog.report_error(error)
    code = status(code)
    sys.stderr.flush()
    os._exit(code)  # a normal exit may abort while torch tears down its process groups


def _own_device(device: str) -> tuple[str, str]:
    """The device of this process, one GPU each, and an error message or ""."""
    import torch

    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device, ""
    local, count = environment.local_rank(), torch.cuda.device_count()
    if local >= count:
        return "cpu", f"each process needs a CUDA device: this is process {local + 1}, the machine has {count}"
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
    kv_argument(parser)
    pipeline_arguments(parser, nproc=2)
    parser.add_argument("--device", type=str, default="auto", help="auto (CUDA if there is any), cpu, cuda")
    parser.add_argument("--dtype", type=str, help="float32, bfloat16, float16 or float64")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch, in each process")


def pipelined(
    a: Namespace, model: VideoModel, execution: ExecutionConfig, options: VideoOptions, piped: bool = True
) -> tuple[ExecutionConfig, VideoOptions]:
    """Both with the split of a pipeline of one process, and with what is to be measured first."""
    if piped and execution.mesh is None and execution.steps_per_rank is None:
        execution = replace(execution, steps_per_rank=(a.steps or len(model.rollout.steps),))
    if "measured" in (a.steps_per_rank, a.fuse_cache_denoise):
        from ..pipelines.measured import measured

        return measured(model, execution, options, choose_fusion=a.fuse_cache_denoise == "measured")
    return execution, options


def verify_parity(a: Namespace) -> None:
    """Make the same video on the job's processes and on one, and print the largest difference of their latents.

    Raises:
        FloatingPointError: it is larger than the tolerance.
    """
    if not a.tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {a.tolerance}")
    with job(a) as here:
        import torch

        from ..config import ExecutionConfig
        from ..models.registry import load_video_model
        from ..pipelines.video_pipeline import VideoOptions, VideoPipeline

        torch.set_num_threads(a.threads)
        model = load_video_model(a.model, a.device, a.dtype, linear_dtype=a.linear_dtype)
        options = VideoOptions(a.prompt, num_frames=a.num_frames, seed=a.seed, order="stream", **rollout_options(a))
        execution, options = pipelined(a, model, here.execution(a), options)

        def blocks(execution: ExecutionConfig) -> tuple[Any, list[Any]]:
            run = VideoPipeline(model, execution).prepare(options)
            return run, [block.latents for block in run.rollout]

        run, actual = blocks(execution)
        if not run.makes_frames:
            return
        pipeline = run.rollout.pipeline
        shared = "+".join(map(str, pipeline.stage.split)) + " steps" if pipeline else f"parallel={a.parallel}"
        del run
        alone = ExecutionConfig(
            cuda_graph=execution.cuda_graph, attention_impl=execution.attention_impl, **execution.dtypes
        )
        expected = blocks(alone)[1]
        apart = [(x.double() - y.double()).abs().max() for x, y in zip(actual, expected, strict=True)]
        difference = float(torch.stack(apart).max())  # NaN if any is, which Python's max() may pass over
        same = all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))
        result = "the same bits" if same else f"largest difference {difference:.3g}"
        where = f"{model.device}, {dtype_name(model.dtype)}, {torch.get_num_threads()} threads"
        print(
            f"{len(actual)} blocks of {model.name} ({model.weights_sha256[:12]}) on {here.ranks} processes "
            f"({shared}) and on one ({where}): {result}"
        )
        if not difference <= a.tolerance:  # nan is a difference too
            raise FloatingPointError(f"latents differ by {difference:.3g}, tolerance is {a.tolerance:g}")
