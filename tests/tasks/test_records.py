import io
import json
import urllib.error

import pytest
from datasets import Dataset

from molf.data.records import read_records, read_splits
from molf.errors import InputError


def write(path, *values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps({"a": value}) for value in values))


def values(splits):
    return {split: [record["a"] for record in records] for split, records in splits.items()}


def test_a_folders_file_names_say_the_split(tmp_path):
    write(tmp_path / "data" / "test-00000-of-00001.jsonl", 5)
    write(tmp_path / "data" / "train-00001-of-00002.jsonl", 3, 4)
    write(tmp_path / "data" / "train-00000-of-00002.jsonl", 1, 2)
    write(tmp_path / "dev" / "part.json", 6)
    (tmp_path / "README.md").write_text("not data")
    write(tmp_path / ".hidden.jsonl", 9)
    write(tmp_path / "data" / ".ipynb_checkpoints" / "train-checkpoint.jsonl", 9)
    splits = read_splits(tmp_path)
    assert values(splits) == {"train": [1, 2, 3, 4], "test": [5], "validation": [6]}
    assert list(splits) == ["train", "test", "validation"]
    assert [record["a"] for record in read_records(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_links_to_folders_are_read_once(tmp_path):
    data = tmp_path / "data"
    write(data / "train" / "a.jsonl", 1)
    write(tmp_path / "elsewhere" / "b.jsonl", 2)
    (data / "dev").symlink_to(tmp_path / "elsewhere")
    (data / "a-link").symlink_to(data / "train")  # the folder's own name gives the split
    (tmp_path / "elsewhere" / "up").symlink_to(data)
    assert values(read_splits(data)) == {"train": [1], "validation": [2]}


@pytest.mark.parametrize("name", ["train_eval.jsonl", "train-dev-split/a.jsonl"])
def test_a_name_of_two_splits_is_refused(tmp_path, name):
    write(tmp_path / name, 1)
    with pytest.raises(InputError, match=r"names the splits (test|train) and (train|validation)\."):
        read_splits(tmp_path)
    write(tmp_path / "train-dev-split" / "test-eval.jsonl", 2)  # one split, by the file's name
    (tmp_path / name).unlink()
    assert values(read_splits(tmp_path)) == {"test": [2]}


def test_a_folder_without_split_names_is_all_for_training(tmp_path):
    write(tmp_path / "b.jsonl", 2)
    write(tmp_path / "a.jsonl", 1)
    write(tmp_path / "contest.jsonl", 3)  # "test" is not a word of this name
    assert values(read_splits(tmp_path)) == {"train": [1, 2, 3]}


def test_some_named_splits_and_some_not_is_refused(tmp_path):
    write(tmp_path / "train.jsonl", 1)
    write(tmp_path / "more.jsonl", 2)
    with pytest.raises(InputError, match=r"more\.jsonl does not"):
        read_splits(tmp_path)


def test_a_folder_without_data_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="holds no data files"):
        read_splits(tmp_path)


def test_fields_are_required_of_every_split(tmp_path):
    write(tmp_path / "train.jsonl", 1)
    (tmp_path / "test.jsonl").write_text('{"b": 1}')
    with pytest.raises(InputError, match=r"\(test\), record 0: lacks the field 'a'"):
        read_splits(tmp_path, ("a",))


@pytest.fixture
def no_hub(monkeypatch):
    import datasets

    def fail(name):
        raise AssertionError(f"the Hub was asked for {name}")

    monkeypatch.setattr(datasets, "load_dataset", fail)


@pytest.mark.parametrize(
    "source",
    [
        "missing",
        "./a/b",
        "/a/b",
        "~/missing",
        "a/b/c",
        "a/b.jsonl",
        "a\\b",
        "owner/",
        "x" * 5000,
        "a\0b",
    ],
)
def test_what_looks_like_a_path_is_not_looked_up_on_the_hub(no_hub, source):
    with pytest.raises(InputError, match=r"file not found|is not a path") as error:
        read_splits(source, option="eval_data")
    assert str(error.value).startswith("eval_data: ")


def test_a_name_in_an_existing_folder_is_a_path(no_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError, match="file not found"):
        read_splits("data/missing")


def test_hub_splits_are_used_by_name(monkeypatch):
    import datasets

    loaded = {"test": Dataset.from_list([{"a": 2}]), "train": Dataset.from_list([{"a": 1}])}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: loaded)
    assert values(read_splits("owner/name")) == {"train": [1], "test": [2]}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"all": loaded["train"]})
    assert values(read_splits("owner/name")) == {"train": [1]}
    loaded |= {"Val": Dataset.from_list([{"a": 3}]), "extra": loaded["train"]}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: loaded)
    with pytest.warns(UserWarning, match=r"are not read: extra\. owner/name::extra reads one of"):
        assert values(read_splits("owner/name")) == {"train": [1], "test": [2], "validation": [3]}
    loaded = {"v1": loaded["train"], "v2": loaded["train"]}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: loaded)
    with pytest.raises(InputError, match=r"has the splits v1, v2, .* as owner/name::v1\.$"):
        read_splits("owner/name")


def test_one_split_of_a_hub_data_set(monkeypatch):
    """As `train_sft` and `test_sft` of chat data; it is all of the data, whatever its name."""
    import datasets

    def load_dataset(name, configuration="default"):
        asked.append((name, configuration))
        splits = {"train_sft": 1, "test_sft": 2, "train": 3}
        return {split: Dataset.from_list([{"a": value}]) for split, value in splits.items()}

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert values(read_splits("owner/name::train_sft")) == {"train": [1]}
    assert values(read_splits("owner/name:main:test_sft")) == {"train": [2]}
    with pytest.warns(UserWarning, match="owner/name:main:train_sft reads one of them"):
        assert values(read_splits("owner/name:main")) == {"train": [3]}
    assert asked == [("owner/name", "default"), ("owner/name", "main"), ("owner/name", "main")]
    with pytest.raises(InputError) as error:
        read_splits("owner/name::sft", option="eval_data")
    assert str(error.value) == (
        "eval_data: owner/name::sft names a split that does not exist. The splits are train_sft, "
        "test_sft, train."
    )
    for source in ("owner/name:", "owner/name::", "owner/name:a:b:c"):
        with pytest.raises(InputError, match="file not found"):
            read_splits(source)


def test_a_configuration_of_a_hub_data_set(monkeypatch):
    import datasets

    def load_dataset(name, configuration=None):
        if configuration is None:
            raise ValueError(
                "Config name is missing.\nPlease pick one among the available configs: "
                f"['main', 'other']\nExample of usage:\n\t`load_dataset('{name}', 'main')`"
            )
        return {"train": Dataset.from_list([{"a": f"{name}, {configuration}"}])}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert values(read_splits("owner/name:main")) == {"train": ["owner/name, main"]}
    with pytest.raises(InputError) as error:
        read_splits("owner/name")
    assert str(error.value) == (
        "data: owner/name has the configurations 'main', 'other'. Give one of them, as "
        "owner/name:CONFIGURATION."
    )


def test_an_unreachable_hub_is_one_line(monkeypatch):
    import datasets

    def fail(name):
        raise ConnectionError(f"Couldn't reach {name}\nand a long traceback")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError) as error:
        read_splits("owner/name", option="eval_data")
    assert str(error.value) == (
        "eval_data: owner/name is no local file or folder, and the Hugging Face Hub gave no data "
        "set of that name (Couldn't reach owner/name). --eval_data also takes a local file or "
        "folder."
    )


def answer(content):
    response = io.BytesIO(content)
    response.headers = {"Content-Length": str(len(content))}
    return response


def test_an_address_is_downloaded_once(monkeypatch, tmp_path):
    monkeypatch.setenv("MOLF_CACHE", str(tmp_path / "cache"))
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return answer(b'[{"a": 1}]')

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    for _ in range(2):
        assert read_records("https://example.org/some/data.json") == [{"a": 1}]
    assert asked == ["https://example.org/some/data.json"]
    assert len(list((tmp_path / "cache").iterdir())) == 1  # no partial file beside it


def test_an_unreachable_address_names_the_option_for_a_local_file(monkeypatch, tmp_path):
    monkeypatch.setenv("MOLF_CACHE", str(tmp_path))

    def urlopen(url, timeout):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(
        InputError, match=r"cannot download https://example.org/a.json .*--data FILE"
    ):
        read_records("https://example.org/a.json")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="is not the address of a"):
        read_records("https://example.org/page.html")


def test_unreachable_hub_is_asked_once(monkeypatch):
    from huggingface_hub import constants

    asked = []

    def unreachable(url):
        asked.append(url)
        raise ConnectionError("no network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    with pytest.raises(InputError, match=r"owner/name .* cannot be reached: no network\. --data"):
        read_records("owner/name")
    assert len(asked) == 1
    assert "datasets/owner/name" in asked[0]


def test_a_download_that_cannot_be_kept_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("MOLF_CACHE", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: answer(b'[{"a": 1}]'))

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(InputError, match=r"cannot be kept in .*: No space left on device\. Set MO"):
        read_records("https://example.org/some/data.json")
    assert list(tmp_path.iterdir()) == []
