"""Trainings report nothing to the Hub, which a small server on loopback stands for."""

from __future__ import annotations

import os
import time

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import send_telemetry

from fake_hub import running_hub
from molf.job.libraries import no_usage_reports


@pytest.fixture
def hub(monkeypatch):
    """A hub, with all settings as where nothing was set: reports are on."""
    with running_hub(monkeypatch) as found:
        for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "DISABLE_TELEMETRY", "CI"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
        yield found


def reports(hub, least=0):
    deadline = time.monotonic() + 10
    while True:  # they are sent by a thread
        found = [path for _, path in hub.requests if path.startswith("/api/telemetry/")]
        if len(found) >= least or time.monotonic() > deadline:
            return found
        time.sleep(0.01)


def test_a_training_reports_nothing(hub, record, options, workplace):
    record([*options, "--method", "fft"], workplace / "unreported")
    # The one after it arrives, and none before it.
    constants.HF_HUB_DISABLE_TELEMETRY = False
    send_telemetry("control")
    assert reports(hub, 1) == ["/api/telemetry/control"]


def test_a_choice_of_the_user_stays(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    no_usage_reports()
    assert constants.HF_HUB_DISABLE_TELEMETRY is False


@pytest.mark.parametrize(
    ("name", "off", "on"),
    [("WANDB_ERROR_REPORTING", "false", "true"), ("MLFLOW_DISABLE_TELEMETRY", "true", "false")],
)
def test_reports_of_trackers_are_off_unless_chosen(monkeypatch, name, off, on):
    monkeypatch.setenv(name, on)
    no_usage_reports()
    assert os.environ[name] == on
    monkeypatch.delenv(name)
    no_usage_reports()
    assert os.environ[name] == off
