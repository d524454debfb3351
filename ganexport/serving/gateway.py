"""The HTTP API: checks a request, admits it, has a replica answer it, and never queues without bound."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import Callable
from importlib.resources import files
from typing import Annotated, Any, Literal, Protocol

import msgspec
from fastapi import Body, FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from pydantic import Discriminator, Tag

import ganexport
from ganexport.errors import GanExportError, UsageError
from ganexport.seeding import MAX_SEED
from ganexport.serving.admission import Admission, Refused
from ganexport.serving.drawing import Job, check
from ganexport.serving.encoding import MEDIA_TYPES
from ganexport.serving.engine import Answer
from ganexport.serving.metrics import CONTENT_TYPE, Log, Metrics
from ganexport.serving.requests import MAX_LABEL, BySeed, BySeeds, Problem, Walk, fit_schema, job_of
from ganexport.serving.versions import Version, VersionStore


class Replicas(Protocol):
    """Whoever generates."""

    async def generate(self, version: Version, job: Job) -> Answer:
        """Answer one job; raises ReplicaLostError when no replica could be reached."""

    async def ping(self) -> bool:
        """Whether a replica answers."""


class ReplicaLostError(GanExportError):
    """No replica could answer, though the request may be fine."""


class Gateway:
    """What the routes share.

    Args:
        store: Says which version serves.
        replicas: Generate.
        admission: Backpressure.
        metrics: Of ``/metrics``.
        log: Of events.
        max_count: Most samples in a request.
        timeout: Seconds for a request, waiting included.
    """

    def __init__(
        self,
        store: VersionStore,
        replicas: Replicas,
        admission: Admission,
        metrics: Metrics,
        log: Log,
        *,
        max_count: int,
        timeout: float,
    ) -> None:
        self.store, self.replicas, self.admission, self.metrics, self.log = store, replicas, admission, metrics, log
        self.max_count, self.timeout = max_count, timeout
        self.reachable = False
        self.refusal: str | None = None

    @property
    def ready(self) -> bool:
        """Whether new requests will be served."""
        return self.reachable and not self.admission.stopping

    async def answer(self, request: Request, job: Job) -> Response:
        """Generate, or say why not: 422 what cannot be, 429 and 503 what cannot be now."""
        version = self.store.current
        check(job, version.checked.abilities)
        request.scope["log"] = {"samples": job.count, "format": job.format, "version": version.digest}
        with self.admission.admit(job.count):
            answer = await self._generate(request, version, job)
        if answer.refused is not None:
            raise UsageError(answer.refused)
        self.metrics.samples.inc(answer.samples)
        for rows, seconds in answer.batches:
            self.metrics.batch_rows.observe(rows)
            self.metrics.batch_seconds.observe(seconds)
        return Response(answer.body, media_type=answer.media_type, headers={"x-ganexport-version": version.digest})

    async def _generate(self, request: Request, version: Version, job: Job) -> Answer:
        try:
            return await asyncio.wait_for(self.replicas.generate(version, job), self.timeout)
        except TimeoutError:
            raise Refused(503, f"no answer within {self.timeout:g} s", self.admission.retry_after()) from None
        except ReplicaLostError as error:
            raise Refused(503, str(error), self.admission.retry_after()) from None
        except Exception as error:  # noqa: BLE001 - an engine's fault is the operator's to read, not the client's
            self.log("generate-failed", "error", id=request.scope["request_id"], reason=repr(error)[:2000])
            raise Refused(
                503, f"the generator failed; the log has the reason under {request.scope['request_id']}", 1
            ) from None

    async def watch_replicas(self, seconds: float = 1.0) -> None:
        """Keep :attr:`reachable` true to the replicas; runs until cancelled."""
        while True:
            try:
                self.reachable = await asyncio.wait_for(self.replicas.ping(), 5.0)
            except Exception:  # noqa: BLE001 - whatever the reason, it is not reachable
                self.reachable = False
            self.metrics.ready.set(self.ready)
            await asyncio.sleep(seconds)


def _kind(body: Any) -> str:
    return "seeds" if (isinstance(body, dict) and "seeds" in body) or isinstance(body, BySeeds) else "seed"


GenerateBody = Annotated[
    Annotated[BySeeds, Tag("seeds")] | Annotated[BySeed, Tag("seed")],
    Discriminator(_kind),
    Body(openapi_examples={"one": {"value": {"seed": 7}}, "grid": {"value": {"seeds": [1, 2, 3], "format": "zip"}}}),
]
_BYTES = {"schema": {"type": "string", "format": "binary"}}
_RETRY = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}


def _answers(*types: str) -> dict[int | str, dict[str, Any]]:
    """The documented answers of a route that generates."""
    content = {MEDIA_TYPES[name]: _BYTES for name in types}
    problems = {400: "Not JSON.", 408: "The body came too slowly.", 413: "Too large.", 422: "Cannot be generated."}
    problems[415] = "Not declared as JSON."
    later = {429: "Too many samples are pending.", 503: "Not able to serve now."}
    return {
        200: {"description": "The samples.", "content": content},
        **{status: {"model": Problem, "description": text} for status, text in problems.items()},
        **{status: {"model": Problem, "description": text, "headers": _RETRY} for status, text in later.items()},
    }


def make_app(gateway: Gateway) -> FastAPI:
    """The application, without what surrounds it (:class:`ganexport.serving.envelope.Envelope`)."""
    app = FastAPI(title="ganexport", version=ganexport.__version__, docs_url=None, redoc_url=None)
    _handle_errors(app)
    _add_generation(app, gateway)
    _add_operations(app, gateway)
    _add_page(app)

    def openapi() -> dict[str, Any]:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        return fit_schema(schema, gateway.store.current.checked.abilities, gateway.max_count)

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _add_generation(app: FastAPI, gateway: Gateway) -> None:
    everything, pictures = _answers(*MEDIA_TYPES), _answers("png", "webp")

    def able() -> Any:
        return gateway.store.current.checked.abilities

    @app.post("/v1/generate", responses=everything, response_class=Response, summary="Generate samples")
    async def generate(request: Request, body: GenerateBody) -> Response:
        return await gateway.answer(request, job_of(body, able(), gateway.max_count))

    @app.post("/v1/walk", responses=everything, response_class=Response, summary="Walk between two seeds")
    async def walk(request: Request, body: Walk) -> Response:
        return await gateway.answer(request, job_of(body, able(), gateway.max_count))

    @app.get("/v1/images/{seed}", responses=pictures, response_class=Response, summary="One picture, cacheable")
    async def image(
        request: Request,
        seed: Annotated[int, Path(ge=0, le=MAX_SEED)],
        label: Annotated[int | None, Query(ge=0, le=MAX_LABEL)] = None,
        truncation: Annotated[float | None, Query(allow_inf_nan=False)] = None,
        format: Literal["png", "webp"] = "png",  # noqa: A002 - the API's word
    ) -> Response:
        job = Job(1, seed=seed, labels=label, truncation=truncation, format=format)
        tag = hashlib.sha256(msgspec.json.encode((gateway.store.current.digest, job))).hexdigest()[:32]
        headers = {"etag": f'"{tag}"', "cache-control": "no-cache"}
        if f'"{tag}"' in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        response = await gateway.answer(request, job)
        response.headers.update(headers)
        return response


def _add_operations(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/v1/model", summary="What serves, and what it can be asked for")
    async def model() -> dict[str, Any]:
        version = gateway.store.current
        found: dict[str, Any] = msgspec.to_builtins(version.checked)
        return {"version": version.digest, "max_count": gateway.max_count, **found}

    @app.get("/v1/versions", summary="Versions held, the one that serves last, and why the newest was refused")
    async def versions() -> dict[str, Any]:
        held = [{"version": v.digest, "adopted": v.adopted} for v in gateway.store.history]
        return {"held": held, "serving": gateway.store.current.digest, "refused": gateway.refusal}

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", summary="The process answers")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    not_ready = {503: {"model": Problem, "description": "Not ready.", "headers": _RETRY}}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", responses=not_ready, summary="New requests will be served")  # type: ignore[arg-type]
    async def readyz() -> dict[str, str]:
        if not gateway.ready:
            raise Refused(503, "shutting down" if gateway.admission.stopping else "no replica answers", 1)
        return {"status": "ready"}

    text = {200: {"description": "Prometheus metrics.", "content": {"text/plain": {"schema": {"type": "string"}}}}}

    @app.get("/metrics", responses=text, response_class=Response, summary="Prometheus metrics")  # type: ignore[arg-type]
    async def metrics() -> Response:
        return Response(gateway.metrics.text(), media_type=CONTENT_TYPE)


def _add_page(app: FastAPI) -> None:
    page = files("ganexport.serving").joinpath("page.html").read_text(encoding="utf-8")
    policy = (
        "default-src 'none'; img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        f"frame-ancestors 'none'; script-src {_hashes(page, 'script')}; style-src {_hashes(page, 'style')}"
    )

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(page, media_type="text/html", headers={"content-security-policy": policy})


def _hashes(page: str, tag: str) -> str:
    """The page's own scripts or styles by hash, so that the browser runs nothing else."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def _handle_errors(app: FastAPI) -> None:
    def problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
        # Half a surrogate pair is legal in JSON's escapes and not in UTF-8.
        clean = " ".join(detail.split())[:500].encode("utf-8", "replace").decode()
        return JSONResponse({"detail": clean}, status, headers)

    handlers: dict[type[Exception], Callable[[Any], JSONResponse]] = {
        Refused: lambda e: problem(e.status, e.message, {"retry-after": str(e.retry_after)}),
        GanExportError: lambda e: problem(422, str(e)),
        RequestValidationError: lambda e: problem(*_first(e)),
    }
    for kind, handler in handlers.items():

        async def handle(_request: Request, error: Exception, handler: Any = handler) -> JSONResponse:
            answer: JSONResponse = handler(error)
            return answer

        app.add_exception_handler(kind, handle)


def _first(error: RequestValidationError) -> tuple[int, str]:
    """Status, and the first thing wrong as ``field: reason``; the client's own input is not sent back."""
    found = error.errors()[0]
    if found["type"] == "json_invalid":
        reason = found.get("ctx", {}).get("error", "")
        return 400, f"not JSON: {reason} (at character {found['loc'][-1]})"
    where = [str(part) for part in found["loc"][1:]]  # the first part says body, query or path
    if found["loc"][0] == "body" and len(where) > 1 and where[0] in ("seeds", "seed"):
        where = where[1:]  # the tag of the alternative
    return 422, f"{'.'.join(where)[:80]}: {found['msg']}" if where else str(found["msg"])
