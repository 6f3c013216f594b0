"""The address of a shared store: what it says, and what is said of one that says nothing sensible."""

from __future__ import annotations

import pytest

from pasture.config import validate_settings
from pasture.config.remote import MooncakeUrl, RedisUrl, parse_remote
from pasture.core.errors import ConfigError


def redis(text: str) -> RedisUrl:
    url = parse_remote(text)
    assert isinstance(url, RedisUrl)
    return url


def test_one_redis_with_nothing_said() -> None:
    url = redis("redis://store")
    assert url.servers == (("store", 6379),)
    assert (url.cluster, url.replicas, url.database, url.tls) == (False, 1, 0, False)
    assert (url.username, url.password) == (None, None)
    assert url.lookup_seconds == 0.05


def test_a_list_with_everything_said() -> None:
    url = redis("rediss://herd:p%40ss@a:1,b,[::1]:3/2?replicas=2&ttl=1h&lookup=20ms&ca=/ca.pem&cert=/c.pem&key=/k.pem")
    assert url.servers == (("a", 1), ("b", 6379), ("::1", 3))
    assert (url.username, url.password) == ("herd", "p@ss")
    assert (url.replicas, url.database, url.tls) == (2, 2, True)
    assert (url.ttl_seconds, url.lookup_seconds) == (3600.0, 0.02)
    assert (url.ca_file, url.cert_file, url.key_file) == ("/ca.pem", "/c.pem", "/k.pem")


def test_a_cluster_and_a_password_alone() -> None:
    url = redis("redis://:secret@a,b?cluster=1")
    assert url.cluster
    assert (url.username, url.password) == (None, "secret")


def test_mooncake() -> None:
    assert parse_remote("mooncake://master") == MooncakeUrl(("master", 50051), "tcp", "", 1 << 30, None, 0.05)
    url = parse_remote("mooncake://10.0.0.1:9000?protocol=rdma&device=mlx5_0&share=2GiB&host=10.0.0.7&lookup=10ms")
    assert url == MooncakeUrl(("10.0.0.1", 9000), "rdma", "mlx5_0", 2 << 30, "10.0.0.7", 0.01)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("store:6379", "redis://, rediss:// and mooncake:// are"),
        ("redis://", "a host is missing"),
        ("redis://a,,b", "a host is missing"),
        ("redis://a:99999", "a port is a number"),
        ("redis://a,a:6379", "named twice"),
        ("redis://a?replicas=2", "from 1 up to"),
        ("redis://a,b?replicas=x", "is a number"),
        ("redis://a,b?replicas=2&cluster=1", "replicates by itself"),
        ("redis://a/1?cluster=yes", "only database 0"),
        ("redis://a?cluster=perhaps", "1 or 0"),
        ("redis://a?ca=/ca.pem", "ca is no option here"),
        ("redis://a?lookup=0", "above 0"),
        ("redis://a?lookup", "options are written as"),
        ("redis://a/x", "is a number"),
        ("mooncake://u:p@m", "neither users nor a path"),
        ("mooncake://m?protocol=ib", "tcp or rdma"),
        ("mooncake://m?share=2G", "GiB or 2GB"),
    ],
)
def test_what_is_wrong_is_said(text: str, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        parse_remote(text)
    with pytest.raises(ConfigError, match=what):
        validate_settings({"kv_remote": text})


def test_no_message_shows_the_password() -> None:
    with pytest.raises(ConfigError) as caught:
        validate_settings({"kv_remote": "redis://user:hunter2@a?replicas=7"})
    assert "hunter2" not in str(caught.value)


def test_a_remote_store_needs_ram_and_may_be_sealed() -> None:
    with pytest.raises(ConfigError, match="kv_remote is written through RAM"):
        validate_settings({"kv_remote": "redis://a", "kv_ram": "0"})
    assert validate_settings({"kv_remote": "redis://a", "kv_key_file": "secret"}).kv_key_file == "secret"
    with pytest.raises(ConfigError, match="give one of them"):
        validate_settings({"kv_key_file": "secret"})
