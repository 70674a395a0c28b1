"""Data sets on a Hub that does not answer, or has none of that name: refused in one line, and at once."""

from __future__ import annotations

import time

import pytest

from compress.calibration.documents import check_data
from compress.errors import RecipeError
from compress.recipe import Calibration
from tests.hub_server import HubServer

SETTINGS = Calibration(data="owner/data", split="train_sft")


@pytest.fixture
def online(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
    return hub


def refusal() -> str:
    with pytest.raises(RecipeError) as caught:
        check_data(SETTINGS, "calibration")
    message = str(caught.value)
    assert message.startswith(
        "calibration.data: data set 'owner/data' (split 'train_sft') cannot be loaded from the Hub: "
    )
    assert message.endswith("--set calibration.data=shipped")
    assert "\n" not in message
    return message


def test_nobody_answers(online: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    refusal()  # imports done
    start = time.monotonic()
    assert "the Hub cannot be reached (ConnectError); check the network, or set HF_HUB_OFFLINE=1 if it" in refusal()
    assert time.monotonic() - start < 2


def test_the_hub_is_down(online: HubServer) -> None:
    online.trouble("/api/datasets/", status=503, times=100)
    assert f"the Hub ({online.url}) answers 503; try again later" in refusal()
    assert len(online.requests) == 1


def test_there_is_none_of_that_name(online: HubServer) -> None:
    assert "check name, subset and split" in refusal()
    assert len(online.requests) == 1
