"""GET /v1/models, and what the gateway says of itself: /health, /ready, /metrics, /admin/status."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from trident_gateway.catalog import Model, find
from trident_gateway.gateway import gateway_of
from trident_gateway.metrics import CONTENT_TYPE
from trident_gateway.openai.sampling import Json, now

router = APIRouter()
STARTED = now()


def _described(name: str, model: Model) -> Json:
    return {
        "id": name,
        "object": "model",
        "created": STARTED,
        "owned_by": "trident",
        "task": model.task,
        "max_model_len": model.context,
        "verified": model.verified,
    }


@router.get("/v1/models")
async def every(request: Request) -> Response:
    """The models that can be asked, under their aliases too."""
    gateway = gateway_of(request)
    models = gateway.servers.models()
    named = dict(models)
    for name, model in models.items():
        named |= {f"{name}:{adapter}": model for adapter in model.adapters}
    for alias, meant in gateway.settings.aliases.items():
        if (aliased := find(models, meant)) is not None:
            named[alias] = aliased
    return JSONResponse({"object": "list", "data": [_described(name, model) for name, model in named.items()]})


@router.get("/v1/models/{name:path}")
async def one(request: Request, name: str) -> Response:
    """One of them; an alias may have slashes, as the names of the Hugging Face hub have."""
    if not name:
        raise HTTPException(404)
    return JSONResponse(_described(name, await gateway_of(request).model(name)))


@router.get("/health")
async def health() -> Response:
    """The process lives."""
    return JSONResponse({"status": "ok"})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Whether a request would be answered."""
    gateway = gateway_of(request)
    if gateway.draining:
        return JSONResponse({"status": "draining"}, 503)
    if not gateway.servers.ready:
        return JSONResponse({"status": "no server answers"}, 503)
    return JSONResponse({"status": "ready"})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """The numbers of the gateway, as Prometheus reads them."""
    gateway = gateway_of(request)
    gateway.metrics.depths(gateway.admission.depths())
    return Response(gateway.metrics.text(), media_type=CONTENT_TYPE)


@router.get("/admin/status")
async def status(request: Request) -> Response:
    """The servers and the queues, as this process sees them."""
    gateway = gateway_of(request)
    servers = [
        {"address": each.address, "healthy": each.healthy, "running": each.running, "models": sorted(each.models)}
        for each in gateway.servers.every
    ]
    queues = {
        model: {"running": running, "waiting": waiting}
        for model, (running, waiting) in gateway.admission.depths().items()
    }
    return JSONResponse({"servers": servers, "queues": queues, "draining": gateway.draining})
