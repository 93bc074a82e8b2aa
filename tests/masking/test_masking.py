"""What is masked, and what must not be."""

import json
import time

import pytest

from molf.masking import known, learn, mask, mask_given, mask_text

LETTERS = "aB3" * 12


@pytest.fixture(autouse=True)
def nothing_learned(monkeypatch):
    monkeypatch.setattr(known, "_learned", {})


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://h.org/a/f.jsonl?sv=1&sig=X%3D", "https://h.org/a/f.jsonl"),
        ("https://h.org/f.jsonl#access_token=X", "https://h.org/f.jsonl"),
        ("https://me:X@h.org:8080/f?page=2", "https://h.org:8080/f"),
        ("https://X@h.org/f", "https://h.org/f"),
        ("https://me:X/Y@h.org/f", "https://h.org/f"),
        ("https://me:X?Y#Z@h.org/f", "https://h.org/f"),
        ("https://me@corp:X@h.org/f", "https://h.org/f"),
        ("https://[::1]:80/f?key=X", "https://[::1]:80/f"),
        ("https://h.org:8080/@scope/pkg", "https://h.org:8080/@scope/pkg"),
        ("HTTP://H.ORG/f?X", "HTTP://H.ORG/f"),
        ("s3://X:Y@bucket/f.jsonl", "s3://bucket/f.jsonl"),
        ("s3://X:12/Y+z@bucket/f.jsonl", "s3://bucket/f.jsonl"),
        ("gs://bucket/f?X-Goog-Signature=X", "gs://bucket/f"),
        ("az://container/blob?sig=X", "az://container/blob"),
        ("abfss://box@acc.dfs.core.windows.net/f?sig=X", "abfss://box@acc.dfs.core.windows.net/f"),
        ("hf://datasets/owner/name@main/f", "hf://datasets/owner/name@main/f"),
        ("hf://X@datasets/owner/name", "hf://datasets/owner/name"),
        ("git+ssh://git:X@github.com/o/r.git@v1", "git+ssh://github.com/o/r.git@v1"),
        ("postgres://me:X@db:5432/base", "postgres://db:5432/base"),
        ("jdbc:postgresql://db/base?user=me&password=X", "jdbc:postgresql://db/base"),
        ("jdbc:sqlserver://db:1433;user=me;password=X", "jdbc:sqlserver://db:1433"),
        ("jdbc:oracle:thin:me/X@//db:1521/base", "jdbc:oracle:thin:***@//db:1521/base"),
        ("me:X12345@h.org:/f", "***@h.org:/f"),
        ("//me:X12345@h.org/f", "//***@h.org/f"),
        ("cannot read https://h.org/f?sig=X (404).", "cannot read https://h.org/f (404)."),
        ("(see https://h.org/f?sig=X).", "(see https://h.org/f)."),
        ("'https://me:Xcut...", "'https://***..."),
        ("/facts.jsonl?sv=2024&sig=X%3D", "/facts.jsonl?sv=2024&sig=***"),
    ],
)
def test_addresses_are_stripped(text, shown):
    assert mask_text(text) == shown
    assert mask_text(shown) == shown


@pytest.mark.parametrize(
    "secret",
    [
        "?key=SECRET",
        "/f.jsonl?sv=2&sig=SECRET&se=3",
        "a&auth=SECRET",
        "auth=SECRET",
        "api-key=SECRET",
        "api_key: SECRET",
        "apikey=SECRET",
        "access_key=SECRET",
        "aws_secret_access_key = SECRET",
        "aws_access_key_id=SECRET",
        "AccountName=me;AccountKey=SECRET==;EndpointSuffix=x",
        "secret=SECRET",
        "client_secret=SECRET",
        "pwd=SECRET",
        "Driver=x;Uid=me;Pwd=SECRET;",
        "password=SECRET",
        "password: SECRET",
        "db.passwd=SECRET",
        "DB_PASS=SECRET",
        "token=SECRET",
        "hub_token='SECRET'",
        "hub_token='SECRET",
        f"hub_token='SECRET{'x' * 2000}'",
        '{"hubToken": "SECRET"}',
        "{'api-key': 'SECRET'}",
        r"{\"api_key\": \"SECRET\"}",
        "sig=SECRET",
        "jwt=SECRET",
        "Authorization: Bearer SECRET",
        "Authorization: Basic SECRET",
        "authorization=SECRET",
        "'Authorization': 'token SECRET'",
        "Proxy-Authorization: Basic SECRET",
        "bearer SECRET1234",
        "Cookie: session=SECRET; a=b",
        "x-api-key: SECRET",
        "Incorrect API key provided: SECRET",
        "--api-key SECRET",
        "--api-key=SECRET",
        "run --hub_token SECRET now",
        "['molf', '--api-key', 'SECRET']",
        "--training_args.hub_token SECRET",
        "export HF_TOKEN=SECRET",
        "AZURE_STORAGE_CONNECTION_STRING=SECRET",
        "x_secret_key=SECRET",
        "pass=SECRET",
        "PASSWORD : SECRET",
        "api_key => SECRET",
        "auth=('me', 'SECRET')",
        "https%3A%2F%2Fh%2Ff%3Fsig%3DSECRET",
        "/f;jsessionid=SECRET",
    ],
)
def test_what_a_name_tells_is_masked(secret):
    for word in ("hunter2x", "a1B2c3D4e5F6", "correct-horse9"):
        masked = mask_text(f"it was {secret.replace('SECRET', word)}")
        assert word not in masked
        assert "***" in masked
        assert mask_text(masked) == masked


@pytest.mark.parametrize(
    "token",
    [
        "ghp_" + LETTERS,
        "gho_" + "a" * 36,
        "github_pat_11ABCDEFG0_" + LETTERS,
        "hf_" + "abcdefghij" * 3,
        "sk-" + LETTERS,
        "sk-" + "a" * 48,
        "sk-proj-" + LETTERS + "-x_Y",
        "sk-ant-api03-" + LETTERS + "-AA",
        "AKIAIOSFODNN7EXAMPLE",
        "AIzaSyD-" + LETTERS,
        "xoxb-123456789012-" + LETTERS,
        "xoxp-1-2-" + LETTERS,
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl_-",
        "glpat-" + "x" * 20,
        "-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc=\n-----END RSA PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----\nMIIE",
    ],
)
def test_tokens_are_masked(token):
    assert mask_text(token) == "***"
    assert mask_text(f"Invalid key {token}, given: 1").startswith("Invalid key ***")
    assert mask_text(f"/data/{token}").startswith("/data/***")


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens=100 tokens: 12 tokens_per_second=31.5",
        "learning_rate: 5e-05",
        "loss per token: 2.134",
        "eos_token: </s>",
        "pad_token=<pad>",
        "the token '<|extra|>' (id 5)",
        "token: the",
        "tokenizer=gpt2 tokenizers: 0.21.0",
        "keyboard=qwerty; monkey: banana key: value",
        "attention.self.key: 0.50",
        "skip_special_tokens=True",
        "sk-learn.csv",
        "sk-learn-internationalization.csv",
        "task-sk-en",
        "/data/task-sk-en/sk-train-2024.jsonl",
        "ghp_results.csv",
        "hf_model.bin",
        "0e0fab5c3d2b1a99887766554433221100ffeedd",
        "sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "author: Jane Doe, authority=city",
        "secretary: Bob",
        "PWD=/home/me",
        "git@github.com:owner/name.git",
        "model Qwen/Qwen2.5-1.5B",
        "What? Is a=b?",
        "a ? b : c",
        "C:\\data\\x.csv",
        "2026-11-28T19:05:41+00:00",
        "    def f(password: str, token=None, api_key=self.api_key, auth=get_auth()):",
        "Give --hub_token to push",
        "Unknown option: --api-key. What is allowed is listed by `molf train --help`.",
        "Bearer of bad news",
        "lora0_r128 0.50 full 0.50",
        "signature mismatch at layer 3",
        "pass: 0.91 pass@1: 0.5 forward_pass=3ms bypass=1",
        "xoxo-kisses-and-hugs",
        "pwd: /home/me",
        "key=3 sort key: name public_key=1",
        "python:3.11-slim@sha256:abc",
        "time: 10:30:00, ratio 1:2@3, me@example.org, mailto:jane.doe@example.org",
        "auth_type=none",
        "http://localhost:8080/x",
        "SELECT token, key FROM auth WHERE id=3",
    ],
)
def test_ordinary_text_survives(text):
    assert mask_text(text) == text
    assert mask([text]) == [text]


def test_values_are_masked_by_their_names():
    value = {
        "api_key": "k",
        "password": 1234,
        "hub_token": "x",
        "eos_token": "</s>",
        "token": 5,
        "auth": True,
        "secret": None,
        "api_keys": ["k"],
        "passwords": {"accuracy": {"value": 0.5, "of": "x"}},
        "max_tokens": 7,
        "data": ["https://h/f?sig=1", 0.1],
        "command": [
            "molf",
            "--api-key",
            "k",
            "--pwd=a b;c",
            "--x.token",
            "--key",
            "q",
            "--seed",
            "1",
        ],
    }
    masked = mask(value)
    assert masked == {
        "api_key": "***",
        "password": "***",
        "hub_token": "***",
        "eos_token": "</s>",
        "token": 5,
        "auth": True,
        "secret": None,
        "api_keys": ["***"],
        "passwords": {"accuracy": {"value": 0.5, "of": "***"}},
        "max_tokens": 7,
        "data": ["https://h/f", 0.1],
        "command": [
            "molf",
            "--api-key",
            "***",
            "--pwd=***",
            "--x.token",
            "--key",
            "***",
            "--seed",
            "1",
        ],
    }
    assert mask(masked) == masked


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "WANDB_API_KEY", "DB_PASSWORD", "NPM_AUTH", "MyClientSecret"]
)
def test_variables_are_masked_wherever_they_turn_up(name, monkeypatch):
    monkeypatch.setenv(name, 'Zk9/4 wor"d')
    for text in ('Zk9/4 wor"d', json.dumps('Zk9/4 wor"d'), "/Zk9%2F4%20wor%22d/"):
        assert "wor" not in mask_text(f"before {text} after")
    assert mask_given({"a": ['x Zk9/4 wor"d', "password=1"]}) == {"a": ["x ***", "password=1"]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "tokenizer"),
        ("MAX_TOKENS", "100000000"),
        ("HF_TOKEN_PATH", "directory"),
        ("MY_TOKEN", "true"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/home/me"),
        ("DB_PASSWORD", "admin"),
    ],
)
def test_ordinary_variables_are_not(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    text = f"it is {value} here"
    assert mask_text(text) == text


def test_the_password_of_a_proxy_is_masked(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://me:pr0xyw0rd@proxy:3128")
    assert (
        mask_text("nonnumeric port: 'pr0xyw0rd@proxy:3128'") == "nonnumeric port: '***@proxy:3128'"
    )


def test_parts_of_what_was_given_are_masked():
    learn(
        [
            "molf",
            "train",
            "--data",
            "https://me:w0rd5ecret@h.org/f?sig=a b;c%2Fd",
            "--api-key",
            "k3yk3y",
        ]
    )
    learn({"training_args": {"hub_token": "t0kent0ken"}, "data": "x.csv"})
    assert mask_text("bad port 'w0rd5ecret@h.org'") == "bad port '***@h.org'"
    assert (
        mask_text("at https://me:w0rd5ecret@h.org/f?sig=a b;c%2Fd now") == "at https://h.org/f now"
    )
    assert mask_text("no k3yk3y and t0kent0ken for x.csv") == "no *** and *** for x.csv"


@pytest.mark.parametrize(
    "text",
    [
        "a" * 50_000,
        "password" * 5_000,
        "--" * 5_000,
        "sk-" * 5_000,
        "x=" * 5_000,
        " " * 50_000,
        "eyJ" * 5_000,
        "https://" * 5_000,
        "?a" * 5_000,
        "'" * 5_000,
        "password='" * 5_000,
        "-----BEGIN PRIVATE KEY-----" * 1_000,
        "a-" * 5_000,
        "sk-" + "a-" * 5_000,
        "password=a,b" * 5_000,
        "a:b@" * 5_000,
        "auth=(" * 5_000,
        "Authorization: " * 5_000,
        "bearer " * 5_000,
        "cookie: a" * 5_000,
        "cookie:" * 5_000,
        "token='a" * 5_000,
        "%3f" * 5_000,
        "jdbc:a:b/" * 5_000,
        "a:bcdefg" * 5_000,
        "api key: " * 5_000,
        "xoxb-" * 5_000,
        "?key=" * 5_000,
        "--api-key " * 5_000,
        '"token": ' * 5_000,
    ],
)
def test_long_texts_take_no_time(text):
    started = time.perf_counter()
    mask_text(text)
    assert time.perf_counter() - started < 2
