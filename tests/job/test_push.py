"""`molf push` and `Run.push`, to a small server on loopback in place of the Hub."""

from __future__ import annotations

import json
import re
import shutil
from datetime import datetime

import pytest
import yaml
from huggingface_hub import ModelCard, constants

import molf
from fake_hub import TOKEN, running_hub
from molf.cli import main
from molf.errors import InputError
from molf.job.push import PushError
from run_files import write_run


@pytest.fixture
def hub(monkeypatch):
    with running_hub(monkeypatch) as found:
        yield found


@pytest.fixture
def copied(lora_run, tmp_path):
    """A copy of a run with an adapter, to be changed."""
    return shutil.copytree(lora_run.path, tmp_path / "copied")


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_model_is_pushed(hub, molf_run, capsys):
    assert main(["push", str(molf_run.path), "me/mine"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{hub.address}/me/mine\n"
    assert re.fullmatch(r"Uploading \d+ files \([\d,]+ bytes\) to me/mine\n", printed.err)
    assert hub.files("me/mine") == files_in(molf_run.path / "model")
    (commit,) = hub.commits
    assert commit[:2] == ("me/mine", "main")
    assert commit[2].startswith(f"Upload model of {molf_run.path.name} by molf ")
    assert hub.repos["me/mine"].private is False
    assert hub.tokens == {f"Bearer {TOKEN}"}


def test_the_client_of_the_hub_uploads_small_files_with_xet_installed(hub, molf_run, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.large = False
    assert molf.Run(molf_run.path).push("mine") == f"{hub.address}/me/mine"
    assert hub.files("me/mine") == files_in(molf_run.path / "model")


def test_an_adapter_goes_to_a_branch_of_a_private_repository(hub, lora_run, capsys):
    given = [str(lora_run.path), "me/mine", "--what", "adapter", "--private"]
    assert main(["push", *given, "--revision", "r4"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{hub.address}/me/mine/tree/r4\n"
    assert "names the base by a path of this machine" in printed.err
    assert hub.repos["me/mine"].private
    assert hub.files("me/mine") == {}
    assert hub.files("me/mine", "r4") == files_in(lora_run.path / "adapter")
    # Again, and now repository and branch exist.
    assert main(["push", *given, "--revision", "r4"]) == 0
    assert len(hub.commits) == 2


def test_a_public_repository_is_no_private_one(hub, molf_run, capsys):
    assert main(["push", str(molf_run.path), "me/mine"]) == 0
    assert main(["push", str(molf_run.path), "me/mine", "--private"]) == 2
    assert "me/mine exists and is public" in capsys.readouterr().err
    assert len(hub.commits) == 1


def test_the_dry_run_is_the_upload(hub, molf_run, monkeypatch, capsys):
    given = [str(molf_run.path), "me/mine"]
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["push", *given, "--dry_run"]) == 0
    assert hub.requests == []
    head, _, card = capsys.readouterr().out.partition("README.md:\n")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert main(["push", *given]) == 0
    uploaded = hub.files("me/mine")
    first, *lines = head.splitlines()
    shown = {name: int(size.replace(",", "")) for size, name in map(str.split, lines)}
    assert shown == {name: len(content) for name, content in uploaded.items()}
    total = sum(shown.values())
    assert first == (
        f"{hub.address}/me/mine, branch main: {len(shown)} files ({total:,} bytes) from "
        f"{molf_run.path}/model"
    )
    assert card == uploaded["README.md"].decode().rstrip() + "\n"


def test_the_client_retries(hub, molf_run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.failures["/preupload/"] = [503, 503]
    assert molf.Run(molf_run.path).push("me/mine")
    assert [path for _, path in hub.requests if "/preupload/" in path] == [
        "/api/models/me/mine/preupload/main"
    ] * 3


@pytest.mark.parametrize("name", ["model", "adapter"])
def test_the_card_has_the_metrics_as_the_hub_reads_them(lora_run, name):
    text = (lora_run.path / name / "README.md").read_text()
    card = ModelCard(text)
    after = json.loads((lora_run.path / "eval.json").read_text())["after"]
    assert card.data.model_name == lora_run.path.name
    found = {one.metric_type: one for one in card.data.eval_results}
    assert {kind: one.metric_value for kind, one in found.items()} == {
        kind: metric["value"] for kind, metric in after.items() if metric["value"] is not None
    }
    es = found["es"]
    assert (es.task_type, es.dataset_type, es.dataset_split) == ("text-generation", "fact", "test")
    assert found["forgetting_loss"].dataset_name == "held-out text"
    shown = f"{after['es']['value']:.3f} [{after['es']['low']:.3f}, {after['es']['high']:.3f}]"
    assert shown in card.text
    assert text.count("## Metrics") == 1
    assert str(lora_run.path.parent) not in text


def test_a_data_set_of_the_hub_is_named():
    from molf.job.model.card import model_card
    from molf.job.settings.resolved import resolve
    from molf.job.settings.settings import TrainSettings
    from molf.measure import Evaluation, Metric

    options = TrainSettings(
        task="fact",
        model="m",
        data="owner/facts:small",
        eval_part="validation",
        validation_share=0.3,
    )
    settings = resolve(options, datetime.now().astimezone())
    after = Evaluation({"es": Metric(0.5, 0.4, 0.6, 9), "gone": Metric(float("nan"), 0, 1, 0)})
    card = model_card(settings, {"name": "fact"}, Evaluation({}), after)
    (entry,) = yaml.safe_load(card.split("---\n")[1])["model-index"]
    (result,) = entry["results"]
    assert result["dataset"] == {
        "name": "fact",
        "type": "owner/facts",
        "config": "small",
        "split": "validation",
    }
    assert result["metrics"] == [{"type": "es", "value": 0.5}]


def test_a_card_has_the_names_of_all_data_files_without_their_folders():
    from molf.job.model.card import model_card
    from molf.job.settings.resolved import resolve
    from molf.job.settings.settings import TrainSettings
    from molf.measure import Evaluation

    options = TrainSettings(task="fact", model="m", data="c.jsonl,/x/a.jsonl:2,/x/y/b.jsonl")
    settings = resolve(options, datetime.now().astimezone())
    card = model_card(settings, {"name": "fact"}, Evaluation({}), None)
    assert "data: c.jsonl,a.jsonl:2,b.jsonl\n" in card


def test_secrets_are_not_uploaded(hub, copied, capsys):
    """No file with a token leaves, however the user wrote it there."""
    for file, text in (
        ("README.md", "My key: sk-ABCDEFGHIJKLMNOPQRST1234\n"),
        ("added.json", json.dumps({"token": TOKEN})),
    ):
        path = copied / "model" / file
        before = path.read_text() if path.is_file() else ""
        path.write_text(before + text)
        for further in ([], ["--dry_run"]):
            assert main(["push", str(copied), "me/mine", *further]) == 2
            printed = capsys.readouterr()
            assert f"{path} holds a token" in printed.err
            assert TOKEN not in printed.err + printed.out
        path.write_text(before or "{}")
    assert hub.requests == []


def test_a_card_of_the_users_own(hub, copied, capsys):
    (copied / "model" / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    assert main(["push", str(copied), "me/mine"]) == 0
    assert hub.files("me/mine")["README.md"] == b"---\nlicense: mit\n---\n# Mine\n"
    (copied / "model" / "README.md").unlink()
    capsys.readouterr()
    assert main(["push", str(copied), "me/other", "--dry_run"]) == 0
    assert capsys.readouterr().out.endswith("No README.md: the repository gets no card.\n")


def test_caches_of_the_hub_stay_here(hub, copied):
    kept = files_in(copied / "model")
    for folder in (".git", ".cache/huggingface"):
        place = copied / "model" / folder
        place.mkdir(parents=True)
        (place / "file").write_text("x")
    assert main(["push", str(copied), "me/mine"]) == 0
    assert hub.files("me/mine") == kept


def test_wrong_tokens(hub, molf_run, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "z9" * 17)
    assert main(["push", str(molf_run.path), "me/mine"]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert printed[-1].startswith("molf: error: The push to me/mine failed: ")
    assert "401" in printed[-1]
    assert "z9z9" not in str(printed)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    assert main(["push", str(molf_run.path), "me/mine"]) == 2
    assert capsys.readouterr().err == (
        "molf: error: There is no token of the Hub. Run `hf auth login`, or set HF_TOKEN.\n"
    )


def test_failures_on_the_way(hub, molf_run, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.failures["/commit/"] = [500] * 20
    assert main(["push", str(molf_run.path), "me/mine"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("molf: error: The push to me/mine failed: ")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PushError, match="The push to me/mine failed"):
        molf.Run(molf_run.path).push("me/mine")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        molf.Run(molf_run.path).push("me/mine")


def test_wrong_input(hub, molf_run, tmp_path, capsys):
    unfinished = shutil.copytree(molf_run.path, tmp_path / "unfinished")
    (unfinished / "eval.json").unlink()
    probe = write_run(tmp_path / "probe")
    config = yaml.safe_load((probe / "config.yaml").read_text())
    config["run"]["probe"] = True
    (probe / "config.yaml").write_text(yaml.safe_dump(config))
    path = str(molf_run.path)
    for given, words in (
        ([str(unfinished), "me/mine"], "has not ended, so its card has no metrics"),
        ([str(probe), "me/mine"], "is a probe, which keeps no model"),
        ([str(write_run(tmp_path / "empty")), "me/mine"], "has no model/"),
        ([f"{path}/model", "me/mine"], "is a part of the run"),
        ([path, "me/mine/three"], "Invalid repo='me/mine/three'"),
        ([path, "me mine"], "Invalid repo='me mine'"),
        ([path, "me/mine", "--revision", ""], "--revision"),
        ([path, "me/mine", "--what", "adapter"], "molf export --what adapter --rank R"),
        ([path, "me/mine", "--what", "all"], "adapter"),
        ([path], "REPO"),
    ):
        assert main(["push", *given]) == 2, given
        printed = capsys.readouterr()
        assert words in printed.err
        assert len(printed.err.splitlines()) == 1
        assert printed.out == ""
    for name, value in (("what", "all"), ("revision", "")):
        with pytest.raises(InputError, match=f"Invalid {name}='{value}'"):
            molf.Run(path).push("me/mine", **{name: value})
    assert hub.requests == []
