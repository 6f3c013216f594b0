"""The pages and their files: who gets them, what they may load, and that what people wrote stays with the administrator."""

from __future__ import annotations

import dataclasses
import json
import re
from array import array

import httpx
import pytest

from pasture.api import ApiSettings, create_app
from pasture.core.statistics import NamespaceStatistics, PrefixContent, PrefixStatistics, ServiceStatistics
from pasture.core.values import DEFAULT_NAMESPACE, Namespace
from pasture.web.routes import static_files
from pasture.web.snapshot import NAMESPACE_FIELDS, PREFIX_FIELDS, SEQUENCE_FIELDS
from tests.unit.stub_service import StubService

SECRET = "the password is sheep"
PAGES = ("/", "/chat", "/web/dashboard.js", "/web/style.css")


class Wrote(StubService):
    """Somebody wrote a secret, in a namespace whose name is one too."""

    def statistics(self) -> ServiceStatistics:
        statistics = super().statistics()
        head = array("i", [*SECRET.encode()])
        prefixes = (
            PrefixStatistics(7, None, DEFAULT_NAMESPACE, 0, 30, 2, 1, 0.0, 5, head),
            PrefixStatistics(9, 7, Namespace("salt-of-a-tenant"), 30, 30, 1, 0, 2.25, 0, head),
        )
        namespaces = (
            NamespaceStatistics(DEFAULT_NAMESPACE, 60, 30, 1, 70, 20),
            NamespaceStatistics(Namespace("salt-of-a-tenant"), 40, 0, 1, 90, 5),
        )
        return dataclasses.replace(
            statistics, pool=dataclasses.replace(statistics.pool, prefixes=prefixes, namespaces=namespaces)
        )


def client_of(settings: ApiSettings | None = None, service: StubService | None = None) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(create_app(service or Wrote(), settings))
    return httpx.AsyncClient(transport=transport, base_url="http://pasture")


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


KEYED = ApiSettings(api_keys=("theirs",), admin_key="root")


@pytest.mark.parametrize("path", PAGES)
async def test_pages_open_without_a_key_and_may_load_nothing_foreign(path: str) -> None:
    async with client_of(KEYED) as client:
        answer = await client.get(path)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


async def test_a_page_that_has_not_changed_is_not_sent_again() -> None:
    async with client_of() as client:
        first = await client.get("/")
        again = await client.get("/", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("path", ["/web/nothing.js", "/web/..%2Froutes.py", "/web/%2E%2E/routes.py", "/web/lit-html.js.map"])
async def test_no_other_file_is_served(path: str) -> None:
    async with client_of() as client:
        assert (await client.get(path)).status_code == 404


def test_no_page_has_inline_scripts_or_styles_or_names_another_host() -> None:
    for name, file in static_files().items():
        text = file.content.decode()
        if name.endswith(".html"):
            assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon\w+=", text), name
        if not name.endswith("LICENSE"):
            assert not re.search(
                r"(https?:)?//(?!www\.w3\.org/2000/svg)[a-z0-9-]+\.[a-z]", text.replace("<!doctype html>", "")
            ), name


def test_what_was_taken_from_others_comes_with_its_licence() -> None:
    shipped = static_files()
    assert b"BSD-3-Clause" in shipped["lit-html.js"].content
    assert b"Redistribution and use" in shipped["lit-html.LICENSE"].content


async def test_every_file_that_a_page_asks_for_is_there() -> None:
    shipped = static_files()
    for name, file in shipped.items():
        text = file.content.decode()
        if name.endswith(".html"):
            wanted = set(re.findall(r'(?:src|href)="web/([^"]+)"', text))
        elif name.endswith(".js"):
            wanted = set(re.findall(r'from "\./([^"]+)"', text))
        else:
            continue
        assert wanted <= set(shipped), name


@pytest.mark.parametrize("path", ["/v1/live", "/v1/live/now"])
async def test_numbers_are_the_admin_keys_where_there_is_one(path: str) -> None:
    async with client_of(KEYED) as client:
        assert (await client.get(path)).status_code == 401
        assert (await client.get(path, headers=bearer("theirs"))).status_code == 401
    async with client_of(ApiSettings(api_keys=("theirs",))) as client:
        assert (await client.get(path)).status_code == 401
        assert (await client.get("/v1/live/now", headers=bearer("theirs"))).status_code == 200


async def test_what_people_wrote_is_in_no_snapshot() -> None:
    async with client_of() as client:
        text = (await client.get("/v1/live/now")).text
    assert SECRET not in text
    assert json.dumps([*SECRET.encode()])[1:-1].replace(" ", "") not in text
    assert "salt-of-a-tenant" not in text


async def test_what_a_prefix_says_is_told_to_the_administrator_alone() -> None:
    path = "/v1/admin/prefixes/7"
    async with client_of(KEYED) as client:
        assert (await client.get(path)).status_code == 401
        assert (await client.get(path, headers=bearer("theirs"))).status_code == 401
        assert (await client.get("/v1/admin/prefixes/8", headers=bearer("root"))).status_code == 404
        assert (await client.get(f"/v1/admin/prefixes/{10**30}", headers=bearer("root"))).status_code == 400
    content = PrefixContent(tuple(SECRET.encode()), 30, 5, {"disk": 30})
    async with client_of(KEYED, Wrote(contents={7: content})) as client:
        shown = await client.get(path, headers=bearer("root"))
        assert shown.json() == {
            "number": 7,
            "text": SECRET,
            "tokens_shown": len(SECRET),
            "tokens": 30,
            "ram_tokens": 5,
            "slow_tokens": {"disk": 30},
        }
    async with client_of() as client:
        assert (await client.get(path)).status_code == 404, "without an admin key the route does not exist"


async def test_a_snapshot_has_the_numbers_of_the_statistics() -> None:
    async with client_of(ApiSettings(model_alias="herd")) as client:
        snapshot = (await client.get("/v1/live/now")).json()
    assert snapshot["model"] == "herd"
    assert snapshot["headline"]["reused_tokens"] == 70
    assert snapshot["headline"]["saved_seconds"] == round(70 / 330, 1)
    assert snapshot["pool"]["used_cells"] == 100
    assert snapshot["tiers"][0]["bytes_by_form"] == {"raw": 2000, "q8_0": 1000}
    assert dict(zip(SEQUENCE_FIELDS, snapshot["sequences"][1], strict=True))["idle_seconds"] == 2.5
    busiest, _ = (dict(zip(NAMESPACE_FIELDS, row, strict=True)) for row in snapshot["namespaces"])
    assert (busiest["number"], busiest["hit_tokens"]) == (2, 90), "numbered as they came, the busiest first"
    assert snapshot["prefixes"] == [[7, None, 1, 0, 30, 2, 1, 0.0, 5, None], [9, 7, 2, 30, 30, 1, 0, 2.2, 0, None]]
    assert len(PREFIX_FIELDS) == 10


async def test_the_stream_ends_when_the_server_drains() -> None:
    service = StubService()
    await service.drain()
    async with client_of(service=service) as client:
        answer = await client.get("/v1/live")
    assert answer.headers["content-type"].startswith("text/event-stream")
    (event,) = answer.text.removesuffix("\n\n").split("\n\n")
    assert json.loads(event.removeprefix("data: "))["draining"] is True
