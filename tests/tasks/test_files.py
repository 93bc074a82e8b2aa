import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from molf.data import json_records
from molf.data.files import check_fields, read_file, read_json
from molf.errors import InputError

RECORDS = [{"a": "x\u2028y", "n": {"b": [1, 2]}}, {"a": "é", "n": {"b": []}}]


def test_all_kinds_of_file_give_the_same_records(tmp_path):
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS)
    (tmp_path / "lines.jsonl").write_text(lines + "\n\n", encoding="utf-8")
    (tmp_path / "lines.json").write_text(lines, encoding="utf-8")
    (tmp_path / "list.json").write_text("\n " + json.dumps(RECORDS, indent=1), encoding="utf-8")
    (tmp_path / "windows.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "table.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert read_file(path) == RECORDS, path.name


def test_a_list_is_read_in_windows(tmp_path, monkeypatch):
    """The result and the message are those of the whole list, for windows that end anywhere."""
    texts = [
        '\n [ {"a": "é\U0001f600\\"}{"} ,\n{"b": [1, {"c": "],["}], "d": -1.5e3},{}, {"e": 0}]\n ',
        "[]",
        '[{"a": 1}, 12, {"a": 2}]',
        '[{"a": 1} {"a": 2}]',
        '[{"a": 1},\n {"a": 2},]',
        '[{"a": 1}]\n{}',
        '[{"a": 1}, {"a": 1, "a": 2}]',
        '[{"a": 1}, {"a": "x',
        '[{"a": 1}\n',
        "[",
        '[{"a": 1}, "b"]',
    ]
    path = tmp_path / "a.json"
    for text in texts:
        path.write_text(text, encoding="utf-8")
        monkeypatch.setattr(json_records, "_WINDOW", 2**20)
        expected = outcome(path)
        for size in (1, 2, 3, 7):
            monkeypatch.setattr(json_records, "_WINDOW", size)
            assert outcome(path) == expected, (text, size)
    assert outcome(path) == f"{path}, record 1: is not an object but str."


def outcome(path):
    try:
        return read_json(path)
    except InputError as error:
        return str(error)


def test_csv_has_texts_and_nulls(tmp_path):
    long = "x" * 200_000  # more than Python's csv takes by default
    path = tmp_path / "a.CSV"
    text = f'\ufeffa,b c\r\n"1, ""2""\n\n;é",\r\n\r\n{long},2\r\n'
    path.write_bytes(text.encode())
    limit = csv.field_size_limit()
    assert read_file(path) == [{"a": '1, "2"\n\n;é', "b c": None}, {"a": long, "b c": "2"}]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.json", b"[]", "is empty"),
        ("a.jsonl", b'{"a": "caf\xe9"}', "is not UTF-8"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', r"line 3: not JSON"),
        ("a.json", b'[{"a": 1},\n{"a": }]', r"line 2: not JSON"),
        ("a.json", b'{\n "a": 1\n}', r"line 1: not JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "record 1: is not an object but list"),
        ("a.json", b'[{"a": 1}, "b"]', "record 1: is not an object but str"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "line 1: not usable JSON"),
        ("a.jsonl", b"[" * 200_000, "not usable JSON"),
        ("a.parquet", b"PAR1 not really", "not a readable Parquet file"),
        ("a.tsv", b"a\tb\n1\t2\n", "unknown kind of data file"),
        ("a.csv", b"", "is empty"),
        ("a.csv", b"a,b\n", "is empty"),
        ("a.csv", b"a,a\n1,2\n", "header of field names, but it names 'a' twice"),
        ("a.csv", b"a,\n1,2\n", "but it has an empty name"),
        ("a.csv", b"a,b\n1,2\n3\n", "line 3: has 1 cells, but the header names 2"),
        ("a.csv", b'a,b\n1,"2\n', "not CSV"),
        ("a.csv", b'a,b\n1,"2"x\n', "line 2: not CSV"),
        ("a.csv", b"a\ncaf\xe9\n", "is not UTF-8"),
    ],
)
def test_a_wrong_file_is_one_clear_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_file(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_lacking_field_is_named_with_its_record():
    with pytest.raises(InputError, match=r"data.jsonl, record 1: lacks the field 'b' .*has: a\)"):
        check_fields({"a": 1, "b": None}, ("a", "b"), "data.jsonl, record 1")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "prompt": "c"}', "line 2"),
        ('{"a": {"x": 1, "x": 1}}', "line 1"),
        ('[{"prompt": "a"},\n{"prompt": "b"},\n{"a": {"x": 1, "x": 1}}]', "record 2"),
    ],
)
def test_a_key_given_twice_is_refused(tmp_path, text, place):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"{place}: the key '(prompt|x)' comes twice"):
        read_file(path)


def test_nulls_that_arrow_fills_in_are_removed_everywhere(tmp_path):
    calls = [{"function": {"name": "f", "arguments": {"city": "Rome"}}}]
    others = [{"function": {"name": "g", "arguments": {"day": "Monday"}}}]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"c": calls}, {"c": others}]), path)
    assert read_file(path) == [{"c": calls}, {"c": others}]


def test_maps_of_arrow_are_objects(tmp_path):
    def write(*items):
        kind = pyarrow.struct([("arguments", pyarrow.map_(pyarrow.string(), pyarrow.string()))])
        column = pyarrow.array([{"arguments": items}], type=kind)
        pyarrow.parquet.write_table(pyarrow.table({"call": column}), tmp_path / "a.parquet")

    write(("city", "Rome"), ("day", None))
    assert read_file(tmp_path / "a.parquet") == [{"call": {"arguments": {"city": "Rome"}}}]
    write(("city", "Rome"), ("city", "Oslo"))
    with pytest.raises(InputError, match=r"a.parquet is not a readable Parquet file: .*duplicate"):
        read_file(tmp_path / "a.parquet")


def test_columns_of_one_name_are_refused(tmp_path):
    columns = [pyarrow.array([1]), pyarrow.array([2])]
    table = pyarrow.table(columns, names=["a", "a"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match="a column has the name of another"):
        read_file(tmp_path / "a.parquet")
