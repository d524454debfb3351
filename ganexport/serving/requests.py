"""The bodies and parameters that the HTTP API takes, and the OpenAPI of the generator that serves."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ganexport.errors import UsageError
from ganexport.seeding import MAX_SEED
from ganexport.serving.drawing import Abilities, Job

#: Beyond it start + count could leave 64 bits.
MAX_START = 2**63
MAX_LABEL = 2**31 - 1

Seed = Annotated[int, Field(strict=True, ge=0, le=MAX_SEED)]
LabelIndex = Annotated[int, Field(strict=True, ge=0, le=MAX_LABEL)]
Truncation = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-1e9, le=1e9)]
Format = Literal["png", "webp", "npy", "zip"]

_FORMAT = Field(
    default=None,
    description="png (the default for pictures), webp: one picture, several as a grid; npy: an array; zip: one each.",
)


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    truncation: Truncation | None = Field(
        default=None, description="Latents are drawn from the normal distribution cut to ± this many deviations."
    )
    format: Format | None = _FORMAT


class BySeeds(_Request):
    """One sample for each seed."""

    seeds: list[Seed] = Field(min_length=1, description="One seed a sample.")
    labels: LabelIndex | list[LabelIndex] | None = Field(
        default=None, description="One class for all samples, or a list with one a sample."
    )


class BySeed(_Request):
    """Samples ``start`` to ``start + count - 1`` of one seed."""

    seed: Seed = 0
    start: Annotated[int, Field(strict=True, ge=0, le=MAX_START)] = 0
    count: Annotated[int, Field(strict=True, ge=1)] = 1
    labels: LabelIndex | list[LabelIndex] | None = Field(
        default=None, description="One class for all samples, or a list with one a sample."
    )


class Walk(_Request):
    """Steps from one seed's sample to another's, both ends included; pictures come as one row."""

    from_seed: Seed
    to_seed: Seed
    steps: Annotated[int, Field(strict=True, ge=2)] = 8
    label: LabelIndex | None = Field(default=None, description="Class of all steps.")


class Problem(BaseModel):
    """Why a request was not answered."""

    detail: str


def job_of(request: BySeeds | BySeed | Walk, able: Abilities, max_count: int) -> Job:
    """The job a request asks for.

    Raises:
        UsageError: More samples than a request may have.
    """
    form = request.format or able.formats[0]
    if isinstance(request, Walk):
        job = Job(
            request.steps,
            seed=request.from_seed,
            walk_to=request.to_seed,
            labels=request.label,
            truncation=request.truncation,
            format=form,
        )
    else:
        labels = tuple(request.labels) if isinstance(request.labels, list) else request.labels
        common: dict[str, Any] = {"labels": labels, "truncation": request.truncation, "format": form}
        if isinstance(request, BySeeds):
            job = Job(len(request.seeds), seeds=tuple(request.seeds), **common)
        else:
            job = Job(request.count, seed=request.seed, start=request.start, **common)
    if job.count > max_count:
        raise UsageError(f"{job.count} samples are more than a request may ask for, {max_count}")
    return job


def fit_schema(schema: dict[str, Any], able: Abilities, max_count: int) -> dict[str, Any]:
    """Narrow the API's schema to the generator that serves: its classes, truncation, formats and counts."""
    for name in ("BySeeds", "BySeed", "Walk"):
        properties = schema["components"]["schemas"][name]["properties"]
        for field in ("labels", "label"):
            if field in properties:
                _fit_labels(properties, field, able, max_count)
        if able.truncation is None:
            properties["truncation"] = {"type": "null"}
        else:
            low, high = able.truncation
            _member(properties["truncation"], "number").update(minimum=low, maximum=high)
        _member(properties["format"], "string")["enum"] = list(able.formats)
    schemas = schema["components"]["schemas"]
    schemas["BySeeds"]["properties"]["seeds"]["maxItems"] = max_count
    schemas["BySeed"]["properties"]["count"]["maximum"] = max_count
    schemas["Walk"]["properties"]["steps"]["maximum"] = max_count
    for parameter in schema["paths"]["/v1/images/{seed}"]["get"]["parameters"]:
        if parameter["name"] == "label" and able.classes is not None:
            _member(parameter["schema"], "integer")["maximum"] = able.classes - 1
        if parameter["name"] == "truncation" and able.truncation is not None:
            _member(parameter["schema"], "number").update(minimum=able.truncation[0], maximum=able.truncation[1])
    return schema


def _fit_labels(properties: dict[str, Any], field: str, able: Abilities, max_count: int) -> None:
    if able.classes is None:
        properties[field] = {"type": "null"}
        return
    _member(properties[field], "integer")["maximum"] = able.classes - 1
    if field == "labels":
        many = _member(properties[field], "array")
        many["items"]["maximum"] = able.classes - 1
        many.update(minItems=1, maxItems=max_count)


def _member(schema: dict[str, Any], kind: str) -> dict[str, Any]:
    """The alternative of this type in ``anyOf``."""
    found: dict[str, Any] = next(part for part in schema.get("anyOf", [schema]) if part.get("type") == kind)
    return found
