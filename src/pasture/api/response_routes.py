"""`/v1/responses`."""

from __future__ import annotations

from fastapi import APIRouter

from pasture.api.gateway import Gateway


def response_routes(gateway: Gateway) -> APIRouter:
    return APIRouter()
