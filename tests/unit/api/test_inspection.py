from __future__ import annotations

from dataclasses import fields

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pasture.api import ApiSettings
from pasture.core.storage import TierStatistics
from tests.unit.api.conftest import Connect
from tests.unit.api.wire import CHAT, chat_body, error_of
from tests.unit.stub_service import EOS, SPECIAL, StubService


async def test_models_are_listed_and_found_under_their_name(connect: Connect) -> None:
    client = connect(StubService(), ApiSettings(model_alias="team/herd"))
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["team/herd"]
    assert (await client.get("/v1/models/team/herd")).json() == listed["data"][0]
    assert (await client.get("/v1/models/stub-model")).status_code == 404


async def test_text_becomes_tokens_and_comes_back(client: httpx.AsyncClient) -> None:
    tokens = (await client.post("/tokenize", json={"content": "Hé</s>"})).json()["tokens"]
    assert tokens == [72, 0xC3, 0xA9, EOS]
    assert (await client.post("/detokenize", json={"tokens": tokens})).json() == {"content": "Hé</s>"}


async def test_tokenising_can_leave_special_tokens_alone_and_show_pieces(client: httpx.AsyncClient) -> None:
    plain = await client.post("/tokenize", json={"content": "</s>", "parse_special": False})
    assert plain.json() == {"tokens": [*b"</s>"]}
    pieces = await client.post("/tokenize", json={"content": "é</s>", "with_pieces": True})
    assert pieces.json()["tokens"] == [
        {"id": 0xC3, "piece": [0xC3]},
        {"id": 0xA9, "piece": [0xA9]},
        {"id": EOS, "piece": "</s>"},
    ]


@pytest.mark.parametrize("tokens", [[-1], [260], ["a"], [1.5], [10**30]])
async def test_tokens_that_do_not_exist_are_refused(client: httpx.AsyncClient, tokens: object) -> None:
    response = await client.post("/detokenize", json={"tokens": tokens})
    assert response.status_code == 400
    assert (error_of(response)["param"] or "tokens").startswith("tokens")


async def test_the_chat_template_can_be_applied_alone(client: httpx.AsyncClient, service: StubService) -> None:
    prompt = (await client.post("/apply-template", json={"messages": chat_body()["messages"]})).json()["prompt"]
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    await client.post(CHAT, json=chat_body())
    assert service.requests[0].prompt[0] == SPECIAL["<|im_start|>"]
    assert service.vocabulary.tokenize(prompt, add_special=True, parse_special=True) == list(service.requests[0].prompt)


async def test_readiness_follows_the_service_and_liveness_does_not_before_its_end(
    client: httpx.AsyncClient, service: StubService
) -> None:
    for path in ("/health", "/health/ready"):
        assert (await client.get(path)).json() == {"status": "ok"}
    await service.drain()
    for path in ("/health", "/health/ready"):
        response = await client.get(path)
        assert response.status_code == 503
        assert error_of(response)["type"] == "unavailable_error"
    assert (await client.get("/health/live")).status_code == 200
    service.alive = False
    response = await client.get("/health/live")
    assert response.status_code == 503
    assert error_of(response)["type"] == "unavailable_error"


async def test_props_and_slots_show_the_pool(client: httpx.AsyncClient) -> None:
    props = (await client.get("/props")).json()
    assert props["total_slots"] == 8
    assert props["default_generation_settings"]["n_ctx"] == 1000
    assert props["default_generation_settings"]["params"]["temperature"] == 0.8
    assert "<|im_start|>" in props["chat_template"]
    assert (props["bos_token"], props["eos_token"]) == ("<s>", "</s>")
    slots = (await client.get("/slots")).json()
    assert [(slot["id"], slot["is_processing"], slot["id_task"]) for slot in slots] == [(0, True, "r-0"), (1, False, None)]


async def test_metrics_show_statistics_and_what_clients_felt(client: httpx.AsyncClient) -> None:
    await client.post(CHAT, json=chat_body())
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    assert samples["pasture_kv_used_cells", "running"] == 60
    assert samples["pasture_prefix_hit_tokens_total", "running"] == 70
    assert samples["pasture_requests_finished_total", "stop"] == 4
    assert samples["pasture_generated_tokens_total",] == 44
    assert samples["pasture_time_to_first_token_seconds_count",] == 1
    assert samples["pasture_inter_token_seconds_count",] == 10
    assert samples["pasture_request_seconds_count",] == 1


async def test_props_show_every_tier_and_what_the_gate_goes_by(client: httpx.AsyncClient) -> None:
    props = (await client.get("/props")).json()
    assert (props["kv"]["bytes"], props["kv"]["form"]) == (4096 * 16, "raw")
    assert (props["kv"]["annex_cells"], props["kv"]["annex_bytes"]) == (512, 512 * 16)
    ram, disk = props["store"]["tiers"]
    assert {field.name for field in fields(TierStatistics)} == set(ram) == set(disk), "all there is"
    assert (ram["name"], ram["bytes_by_form"], disk["damaged_blocks"]) == ("ram", {"raw": 2000, "q8_0": 1000}, 2)
    assert props["store"]["gate"] == {
        "prefill_tokens_per_second": 300.0,
        "save_bytes_per_second": 2e9,
        "restore_bytes_per_second": 3e9,
        "refusals": {"fetch": 4},
    }


async def test_what_rests_for_everybody_is_the_admin_key_s_where_there_is_one(connect: Connect, service: StubService) -> None:
    one, admin = {"authorization": "Bearer sk-one"}, {"x-api-key": "sk-admin"}
    keyed = connect(service, ApiSettings(api_keys=("sk-one",), admin_key="sk-admin"))
    theirs, all_of_it = (await keyed.get("/props", headers=one)).json(), (await keyed.get("/props", headers=admin)).json()
    assert "store" not in theirs
    assert theirs["model"]["shareable"]
    assert len(all_of_it["store"]["tiers"]) == 2
    assert (await keyed.get("/props", headers={"x-api-key": "sk-admi"})).status_code == 401
    assert (await keyed.get("/v1/models", headers=admin)).status_code == 401, "and it opens nothing else of theirs"
    without_keys = connect(service, ApiSettings(admin_key="sk-admin"))
    assert "store" not in (await without_keys.get("/props")).json()
    assert "store" in (await without_keys.get("/props", headers=admin)).json()


async def test_metrics_show_every_tier_and_what_the_gate_goes_by(client: httpx.AsyncClient) -> None:
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families((await client.get("/metrics")).text)
        for sample in family.samples
    }
    assert samples["pasture_kv_bytes",] == 4096 * 16
    assert samples["pasture_kv_annex_bytes",] == 512 * 16
    assert samples["pasture_store_bytes", "ram"] == 3000
    assert samples["pasture_store_blocks", "disk"] == 7
    assert samples["pasture_store_form_bytes", "q8_0", "ram"] == 1000
    assert samples["pasture_store_form_bytes", "q4_0", "ram"] == 0, "every form has its line from the start"
    assert samples["pasture_store_hit_tokens_total", "disk"] == 128
    assert samples["pasture_store_damaged_blocks_total", "disk"] == 2
    assert samples["pasture_store_latency_seconds", "disk"] == 2e-4
    assert samples["pasture_gate_restore_bytes_per_second",] == 3e9
    assert samples["pasture_gate_refusals_total", "fetch"] == 4
    assert samples["pasture_prefetch_conversations_total", "guess"] == 5
    assert samples["pasture_prefetch_issued_bytes_total",] == 900
    assert (samples["pasture_prefetch_used_bytes_total",], samples["pasture_prefetch_wasted_bytes_total",]) == (600, 100)
    assert samples["pasture_policy_cpu_seconds_total",] == 0.25
    of_tiers = {name for name, *labels in samples if labels and name.startswith("pasture_store")}
    assert len(of_tiers) == len(fields(TierStatistics)) - 2, (
        "a line for each figure but the name and what only remote tiers have"
    )


async def test_two_apps_in_one_process_keep_their_metrics_apart(connect: Connect) -> None:
    one, other = connect(StubService()), connect(StubService())
    await one.post(CHAT, json=chat_body())
    assert "pasture_request_seconds_count 0.0" in (await other.get("/metrics")).text
