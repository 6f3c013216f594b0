"""The FastAPI application over a service. Stands on the `Service` port: which engine answers, and how, is not known here."""

from __future__ import annotations

from importlib.metadata import version
from time import monotonic

from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from pasture.api import errors, openapi
from pasture.api.admin import admin_routes
from pasture.api.diagnosis import diagnosis_routes
from pasture.api.disconnect import ClientGone
from pasture.api.gateway import Gateway
from pasture.api.generation import generation_routes
from pasture.api.hints import hint_routes
from pasture.api.inspection import health_routes, inspection_routes, text_routes
from pasture.api.middleware import AdminPort, ApiKeys, LastResort, RequestIds
from pasture.api.response_routes import response_routes
from pasture.api.session_routes import session_routes
from pasture.api.settings import ApiSettings
from pasture.core.errors import ConfigError, RequestError
from pasture.core.ports import Clock, Service
from pasture.sessions.state import State
from pasture.text.templates import ChatTemplate
from pasture.web import web_routes

_CLIENT_CLOSED_REQUEST = 499


def create_app(
    service: Service, settings: ApiSettings | None = None, *, state: State | None = None, clock: Clock = monotonic
) -> FastAPI:
    """An app that serves `service`. Raises ConfigError for a chat template in the settings that does not compile.

    `state`: tenants and sessions, the caller's to close; without one, they are in memory and gone with the app.
    """
    settings = settings or ApiSettings()
    state = state or State(keys=settings.api_keys)
    _check_template(settings)
    app = FastAPI(title="pasture", version=version("pasture"), docs_url=None, redoc_url=None, redirect_slashes=False)
    gateway = Gateway(service, state, settings, clock)
    app.state.service = service
    app.state.gateway = gateway
    for routes in (
        generation_routes,
        hint_routes,
        response_routes,
        session_routes,
        diagnosis_routes,
        admin_routes,
        inspection_routes,
        text_routes,
        health_routes,
    ):
        app.include_router(routes(gateway))
    app.include_router(web_routes(service, gateway.live))
    openapi.install(app, admin=settings.admin_key is not None)
    errors.install(app)
    app.add_exception_handler(ClientGone, _nobody_listens)
    # added last is outermost: ids on every answer, CORS before keys since browsers ask first without one
    app.add_middleware(ApiKeys, keyring=state.keyring, admin_key=settings.admin_key)
    if settings.admin_port is not None:
        app.add_middleware(AdminPort, port=settings.admin_port)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
        )
    app.add_middleware(LastResort)
    app.add_middleware(RequestIds)
    return app


def _check_template(settings: ApiSettings) -> None:
    if settings.chat_template is None:
        return
    try:
        ChatTemplate(settings.chat_template, bos="", eos="").compile()
    except RequestError as error:
        raise ConfigError(str(error)) from error


async def _nobody_listens(_: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_CLOSED_REQUEST)
