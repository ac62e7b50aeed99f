"""`hiar serve`: endless video in a browser and over an open protocol, whole videos as jobs."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from .machine import (
    imports,
    kv_argument,
    linear_argument,
    load_model,
    lora_argument,
    machine_arguments,
    stage_lines,
)

DATA = "hiar-data"
STATE_DISK = 4.0  # GB
DATA_HELP = (
    "folder for videos and for live sessions, which then outlive the server and have their prompts there; "
    f"default: {DATA}, and live sessions end with the server"
)
PROXY_HELP = "addresses of proxies in front, with commas between: their X-Forwarded-For says who the client is"
STATE_HELP = f"GB in --data for states of live sessions, {STATE_DISK:g}; 0: they end with the server"
EXTRA = ("starlette", "uvicorn", "websockets", "prometheus_client")


def serve_arguments(parser: ArgumentParser) -> None:
    """Options of `hiar serve`."""
    parser.add_argument("--model", type=str, default="toy", help="name of a shipped model, or a folder, such as of Wan")
    parser.add_argument(
        "--checkpoint", type=str, help="in place of a Wan folder's own: hiar.pt, .safetensors, a folder"
    )
    parser.add_argument("--vae", type=str, help="of Wan, in place of the folder's: taew2_1.pth, or a full one")
    lora_argument(parser, "several times for several files")
    parser.add_argument("--height", type=int, help="pixels, if a client does not say; default: the model's")
    parser.add_argument("--width", type=int, help="pixels, if a client does not say; default: the model's")
    parser.add_argument("--prompt-cache", type=str, help="folder that keeps prompts and their embeddings (Wan)")
    parser.add_argument(
        "--host", type=str, default="127.0.0.1", help="address; others than this machine's need a token"
    )
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--max-sessions", type=int, default=8, help="live videos at once")
    parser.add_argument(
        "--batch-sessions", type=int, help="live videos made as one batch; default: as many as pay; 1: one at a time"
    )
    parser.add_argument("--keep", type=float, default=60.0, help="seconds that a session without a viewer is kept")
    parser.add_argument("--token-file", type=str, help="tokens, one a line: a client must have one of them")
    parser.add_argument("--allow-host", type=str, help="names of this server, with commas between, beside its address")
    parser.add_argument("--proxy", type=str, help=PROXY_HELP)
    parser.add_argument("--data", type=str, help=DATA_HELP)
    parser.add_argument("--state-disk", type=float, help=STATE_HELP)
    parser.add_argument("--log-prompts", action="store_true", help="write prompts to the log, too")
    kv_argument(parser)
    linear_argument(parser)
    parser.add_argument("--cuda-graph", type=bool, default=False, help="capture forwards as CUDA graphs")
    machine_arguments(parser)


def serve(a: Namespace) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    _require_extra()
    if not 0 <= a.port <= 65535:
        raise ValueError(f"--port must be from 0 to 65535, got {a.port}")
    if a.max_sessions < 1:
        raise ValueError(f"--max-sessions must be at least 1, got {a.max_sessions}")
    if a.state_disk is not None and a.data is None:
        raise ValueError("--state-disk needs --data: without it live sessions end with the server")
    state_disk = STATE_DISK if a.state_disk is None else a.state_disk
    if not 0 <= state_disk <= 1e6:
        raise ValueError(f"--state-disk must be from 0 to 1000000 GB, got {state_disk:g}")
    if a.batch_sessions is not None and a.batch_sessions < 1:
        raise ValueError(f"--batch-sessions must be at least 1, got {a.batch_sessions}")
    if a.cuda_graph and (a.batch_sessions or 1) > 1:
        raise ValueError(f"--batch-sessions must be 1 with --cuda-graph, got {a.batch_sessions}")
    if not 0 <= a.keep <= 86400:
        raise ValueError(f"--keep must be from 0 to 86400 seconds, got {a.keep:g}")
    with imports():
        from ..config import ExecutionConfig
        from ..models.video_model import pick_device, pick_dtype
        from ..planning.free_memory import require_memory
        from ..serve.app import Service, Settings, address, listen, run
        from ..serve.guard import read_tokens
        from ..serve.scheduler import Limits
        from ..serve.store import check_data

    tokens = () if a.token_file is None else read_tokens(Path(a.token_file))
    names, proxies = (_words(words) for words in (a.allow_host, a.proxy))
    settings = Settings(
        a.host, a.port, tokens, (*names, a.host), proxies,
        Limits(a.max_sessions, a.keep, batch_sessions=a.batch_sessions), log_prompts=a.log_prompts,
        state_bytes=int(state_disk * 1e9) if a.data and state_disk else None,
    )  # fmt: skip
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("hiar.serve").setLevel(logging.INFO)
    if a.cuda_graph and pick_device(a.device).type != "cuda":
        raise ValueError(f"--cuda-graph needs a CUDA device, --device {a.device} is {pick_device(a.device)}")
    check_data(Path(a.data or DATA))
    listening = listen(a.host, a.port)  # before the model is loaded, which takes a while
    dtypes = {"kv_dtype": a.kv_dtype, "attention_dtype": a.attention_dtype, "linear_dtype": a.linear_dtype}
    execution = ExecutionConfig(**dtypes, cuda_graph=a.cuda_graph)
    require_memory(
        a.model, pick_device(a.device), pick_dtype(a.dtype), checkpoint=a.checkpoint, vae=a.vae,
        height=a.height, width=a.width, order="stream", lora=bool(a.lora), **dtypes,
    )  # fmt: skip
    model = load_model(
        a, checkpoint=a.checkpoint, vae=a.vae, lora=a.lora, prompt_cache=a.prompt_cache,
        on_checkpoint=lambda line: print(line, file=sys.stderr), on_stage=stage_lines(),
    ).sized(a.height, a.width)  # fmt: skip
    service = Service(model, execution, Path(a.data or DATA), settings)
    try:
        service.start()
        print(f"{model.name} is served at {address(listening)}", flush=True)
        run(service, [listening])
    except BaseException:  # Ctrl-C while the first block is made: Python must not end beneath the thread that makes it
        service.stop()
        raise
    print("stopped", flush=True)


def _words(text: str | None) -> tuple[str, ...]:
    """What commas divide."""
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


def _require_extra() -> None:
    from importlib.util import find_spec

    if missing := [name for name in EXTRA if find_spec(name) is None]:
        raise ValueError(f"hiar serve needs {', '.join(missing)}: pip install 'hiar-kernels[serve]'")
