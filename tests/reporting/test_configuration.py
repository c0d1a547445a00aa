"""Secrets stay out of the configuration that a report shows."""

from __future__ import annotations

from typing import Any

import pytest

from lit_prune.reporting.configuration import without_secrets


@pytest.mark.parametrize(
    "name",
    [
        *("api_key", "apikey", "wandbApiKey", "key", "access-key", "HF_TOKEN", "tokenValue"),
        *("client_secret_id", "passwd", "PASSWORD", "auth", "Authorization", "aws_credentials"),
    ],
)
@pytest.mark.parametrize("value", ["s3cret", ["s3cret"], {"user": "s3cret"}])
def test_secrets_are_known_by_their_names(name: str, value: Any) -> None:
    assert without_secrets({"logger": [{name: value}]}) == {"logger": [{name: "(hidden)"}]}


def test_other_options_stay() -> None:
    config = {
        **{"max_tokens": 64, "token": True, "auth": None, "tokenizer": "some/model"},
        **{"author": "me", "monkey": "m", "keys": ["a"], "train": "https://host/a@b?x=1"},
    }
    assert without_secrets(config) == config


@pytest.mark.parametrize("login", ["user:pw@", "user@", "user:p@w@"])
def test_addresses_lose_their_logins(login: str) -> None:
    found = without_secrets({"train": [f"https://{login}host:80/a"]})
    assert found == {"train": ["https://host:80/a"]}
