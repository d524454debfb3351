"""``ganexport serve``: an artifact over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

EPILOG = """
\b
Example:
  ganexport serve dcgan.artifact --port 8000 --replicas 2 --max-batch 32 --max-delay-ms 5
  curl -d '{"seed": 7}' -H 'content-type: application/json' localhost:8000/v1/generate -o seven.png

\b
Signals: TERM and INT drain and stop; HUP looks for a newer artifact now; USR2 rolls back.
"""


@click.command(epilog=EPILOG)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--replicas", type=click.IntRange(1, 1024), default=1, show_default=True, help="Generating processes.")
@click.option("--max-batch", type=click.IntRange(1, 4096), default=16, show_default=True, help="Samples a batch.")
@click.option(
    "--max-delay-ms", type=click.FloatRange(0, 10_000), default=5.0, show_default=True, help="Wait for a fuller batch."
)
@click.option("--max-count", type=click.IntRange(1, 65536), default=64, show_default=True, help="Samples a request.")
@click.option(
    "--max-pending",
    type=click.IntRange(1),
    help="Samples beyond which: 429  [default: a batch a stream, and one or a half more]",
)
@click.option("--timeout", type=click.FloatRange(0.1, 3600), default=30.0, show_default=True, help="Seconds a request.")
@click.option("--drain", type=click.FloatRange(1, 3600), default=30.0, show_default=True, help="Seconds after TERM.")
@click.option(
    "--drain-delay",
    type=click.FloatRange(0, 600),
    default=0.0,
    show_default=True,
    help="Seconds after TERM not ready, yet serving.",
)
@click.option(
    "--reload", type=click.FloatRange(0, 86400), default=2.0, show_default=True,
    help="Seconds between looks for a newer artifact; 0: only on HUP.",
)  # fmt: skip
@click.option(
    "--state", type=click.Path(path_type=Path, file_okay=False), help="Folder of versions (a shared one on a cluster)."
)
@click.option("--ray", "address", help="Address of a running Ray cluster; without it, Ray starts on this machine.")
@click.option("--backend", help="As in ganexport generate; the best that runs here when not said.")
@click.option("--device", help="cpu, cuda or cuda:1.")
@click.option("--precision", help="fp32, fp16, bf16 or int8, where the artifact has several.")
@click.option(
    "--streams", type=click.IntRange(1, 256), default=1, show_default=True, help="Batches at a time in a replica."
)
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads a batch.")
def command(artifact: Path, max_batch: int, max_delay_ms: float, **chosen: Any) -> int:
    """Serve an artifact over HTTP: an API with OpenAPI, a page to try it, metrics, reload and roll-back.

    Requests are batched, and refused with 429 and Retry-After when more is pending than is useful.
    A newer ARTIFACT is checked in a process of its own and then takes over; a broken one never does.
    """
    from ganexport.serving.engine import EngineSettings
    from ganexport.serving.server import ServerOptions, serve

    of_engine = {name: chosen.pop(name) for name in ("backend", "device", "threads", "streams", "precision")}
    engine = EngineSettings(max_batch=max_batch, max_delay=max_delay_ms / 1e3, **of_engine)
    return serve(artifact, ServerOptions(engine=engine, **chosen))
