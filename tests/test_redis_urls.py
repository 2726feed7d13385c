"""Redis URLs: what each form says, what a wrong one is told (B49), and that no credential shows (B19)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from leasehold.coordinator import RedisClients, RedisUrlError
from leasehold.coordinator.urls import EXPECTED, Form, RedisUrl
from leasehold.workers.settings import SettingsError, load_settings

SECRET = "s3cret"


@pytest.mark.parametrize(
    ("url", "form", "place", "options"),
    [
        ("redis://h", Form.SERVER, "redis://h:6379", {}),
        ("REDIS://h:7/", Form.SERVER, "redis://h:7", {}),
        ("redis://[::1]:7/3", Form.SERVER, "redis://[::1]:7", {"db": 3}),
        ("redis://h?db=4", Form.SERVER, "redis://h:6379", {"db": 4}),
        ("rediss://u:p%40%2F%3F@h/1", Form.SERVER, "rediss://h:6379", {"username": "u", "password": "p@/?", "db": 1}),
        ("redis://:p@h", Form.SERVER, "redis://h:6379", {"password": "p"}),
        ("unix:///run/r%20s.sock?db=2", Form.SOCKET, "unix:///run/r s.sock", {"db": 2}),
        ("redis+unix:///run/r.sock?password=p", Form.SOCKET, "redis+unix:///run/r.sock", {"password": "p"}),
        ("redis+sentinel://a,b:7/main", Form.SENTINEL, "redis+sentinel://a:26379,b:7/main", {}),
        ("rediss+sentinel://u:p@[::1]/main/5", Form.SENTINEL, "rediss+sentinel://[::1]:26379/main", {"db": 5}),
        ("redis+cluster://a,[::2]:7", Form.CLUSTER, "redis+cluster://a:6379,[::2]:7", {}),
        ("rediss+cluster://:p@a:1/0", Form.CLUSTER, "rediss+cluster://a:1", {"password": "p"}),
    ],
)
def test_a_url_says_where_and_how(url: str, form: Form, place: str, options: dict[str, Any]) -> None:
    parsed = RedisUrl.parse(url)
    assert (parsed.form, parsed.tls, str(parsed)) == (form, "ss" in url.partition(":")[0], place)
    assert {**parsed.options, **options} == dict(parsed.options)
    assert RedisClients(url).place == place


def test_the_user_is_the_nodes_and_sentinels_have_their_own_and_tls_is_for_both(tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    authority.write_text("x")
    parsed = RedisUrl.parse(
        f"rediss+sentinel://u:p@h/main?sentinel_username=s&sentinel_password=w%26&ssl_ca_certs={authority}"
        "&ssl_cert_reqs=optional&ssl_check_hostname=false&ssl_min_version=771"
    )
    tls = {
        "ssl_ca_certs": str(authority),
        "ssl_cert_reqs": "optional",
        "ssl_check_hostname": False,
        "ssl_min_version": 771,
    }
    assert dict(parsed.options) == {"username": "u", "password": "p", **tls}
    assert dict(parsed.sentinel_options) == {"username": "s", "password": "w&", **tls}


WRONG = {
    "h:6379": "unknown scheme",
    "http://h": "unknown scheme",
    "redis+cluster:/h": "unknown scheme",
    "redis://": "a host is missing",
    "redis://:s3cret@:6379": "a host is missing",
    "redis+cluster://a,,b": "a host is missing",
    "redis://:s3cret@h:port": "port is no number from 1 to 65535",
    "redis://h:0": "port is no number from 1 to 65535",
    "redis://[::1": "an IPv6 address is not closed",
    "redis://h/s3cret": "db is no number from 0 to 1000000",
    "redis://a,b": "several hosts go with Sentinel and cluster URLs",
    "unix://": "the path of the socket is missing",
    "redis+sentinel://:s3cret@h:26379": "the name of the service is missing",
    "redis+cluster://h/1": "a cluster has no databases",
    "redis+cluster://h?db=1": "a cluster has no databases",
    "redis://h?ssl_ca_certs=/s3cret": "ssl_ca_certs names no file",
    "rediss://h?ssl_ca_certs=/nowhere/s3cret": "ssl_ca_certs names no file",
    "rediss://h?ssl_cert_reqs=s3cret": "ssl_cert_reqs is none of none, optional, required",
    "rediss://h?ssl_check_hostname=s3cret": "ssl_check_hostname is neither true nor false",
    "redis://h?ssl_cert_reqs=none": "ssl_cert_reqs is an option of rediss URLs",
    "redis://h?sentinel_password=s3cret": "sentinel_password is an option of Sentinel URLs",
    "redis://h?socket_timeout=1": "the only options are db, username, password, ",
    "redis://h?s3cret=1": "the only options are db, username, password, ",
}


@pytest.mark.parametrize("url", WRONG)
def test_b49_a_wrong_url_is_one_clear_message_without_anything_of_it(url: str) -> None:
    with pytest.raises(RedisUrlError) as refused:
        RedisClients(url)
    assert str(refused.value).startswith(WRONG[url])
    with pytest.raises(SettingsError) as told:
        load_settings({"LEASEHOLD_REDIS_URL": url, "LEASEHOLD_SECRET": "x" * 16})
    assert str(told.value).startswith(f"LEASEHOLD_REDIS_URL: expected {EXPECTED}: {WRONG[url]}")
    assert SECRET not in f"{refused.value!r} {told.value!r}"


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:s3cret@h",
        "redis+sentinel://user:s3cret@h/main?sentinel_password=s3cret",
        "rediss+cluster://user:s3cret@h?ssl_password=s3cret",
    ],
)
def test_b19_neither_text_nor_repr_of_a_url_holds_its_credentials(url: str) -> None:
    parsed = RedisUrl.parse(url)
    assert SECRET not in f"{parsed} {parsed!r} {RedisClients(url).place}"
