"""A generator inside a FastAPI service: ARTIFACT=… uvicorn app:app

One generator serves all requests: it is thread-safe, and FastAPI runs plain functions in threads.
For batching across requests, backpressure, replicas and reload, use ``ganexport serve`` instead.
"""

import io
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import FastAPI, HTTPException, Path, Query, Request, Response
from PIL import Image

import ganexport


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """One generator for the life of the service."""
    with ganexport.load(os.environ["ARTIFACT"]) as generator:
        generator.generate(1)  # the first call is the slowest: not a visitor's
        app.state.generator = generator
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/images/{seed}.png", response_class=Response)
def image(
    request: Request,
    seed: Annotated[int, Path(ge=0, lt=2**64)],
    truncation: Annotated[float | None, Query(ge=0.01, le=8, allow_inf_nan=False)] = None,
) -> Response:
    """The picture of a seed, as PNG."""
    try:
        picture = request.app.state.generator.generate(1, seed, truncation=truncation)[0]
    except ganexport.GanExportError as error:
        raise HTTPException(422, str(error)) from None
    stream = io.BytesIO()
    Image.fromarray(picture.squeeze()).save(stream, "PNG")
    return Response(stream.getvalue(), media_type="image/png")
