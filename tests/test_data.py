"""Texts, tokens and the default model: what is read, what is refused, and what survives an accident."""

import json
import resource

import numpy as np
import pytest
import torch
from conftest import script

from adaptive import EarlyExitModel, data
from adaptive.prompts import encode, read_parts


def refused(error, call, *args, **kwargs) -> str:
    """The message of the error that a call ends in."""
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def write_rows(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_a_folder_is_read_in_a_fixed_order(tmp_path):
    (tmp_path / "b.txt").write_text("second\nwith two lines")
    (tmp_path / "a").mkdir()
    write_rows(tmp_path / "a" / "x.jsonl", {"text": "first\u2028same text"}, {"text": " "}, {"text": "again"})
    (tmp_path / "notes.md").write_text("not read")
    assert data.read_texts(tmp_path) == ["first\u2028same text", "again", "second\nwith two lines"]


def test_conversations_are_rendered(tmp_path):
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    path = write_rows(tmp_path / "x.jsonl", {"messages": messages}, {"prompt": "2+2?", "answer": "4"})
    assert data.read_texts(path, render=lambda turns: "|".join(t["content"] for t in turns)) == ["2+2?|4"] * 2
    message = refused(ValueError, data.read_texts, path)
    assert f"{path}:1: a conversation" in message and "`render`" in message


@pytest.mark.parametrize(
    "name, content, part",
    [
        ("x.jsonl", '{"text": "a"}\n\n{"text": \n', ":3: not JSON"),
        ("x.jsonl", '{"question": "a", "answer": "b"}', ":1: found the keys 'question', 'answer'; wanted 'text'"),
        ("x.jsonl", "3", ":1: found int, no object"),
        ("x.jsonl", '{"text": 3}', "found the keys 'text'"),
        ("x.jsonl", "\n", "no text in the file"),
        ("x.txt", "  \n", "no text in the file"),
        ("x.csv", "a,b", "is no .txt or .jsonl file"),
    ],
)
def test_unusable_files_are_refused_with_the_place(tmp_path, name, content, part):
    path = tmp_path / name
    path.write_text(content)
    message = refused(ValueError, data.read_texts, path)
    assert part in message and str(path) in message


def test_other_bytes_than_utf8_are_refused(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    assert "x.txt is not UTF-8" in refused(ValueError, data.read_texts, tmp_path)


def test_an_empty_folder_and_a_missing_path_are_refused(tmp_path):
    assert f"no text in 0 .txt and .jsonl files of the folder {tmp_path}" in refused(
        ValueError, data.read_texts, tmp_path
    )
    assert "there is no file or folder" in refused(ValueError, data.read_texts, tmp_path / "no.jsonl")
    assert "there is no file or folder" in refused(ValueError, data.read_texts, "folder/no.txt")


def test_a_data_set_is_loaded_by_name(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if name == "absent":
            raise ConnectionError("no hub")
        return datasets.Dataset.from_dict({"text": ["one", "two", ""], "0": ["eins", "zwei", "drei"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert data.read_texts("org/name") == ["one", "two"]
    assert data.read_texts("org/name:en:test:0") == ["eins", "zwei", "drei"]
    assert data.read_texts("org/name::valid") == ["one", "two"]
    assert asked == [("org/name", None, "train"), ("org/name", "en", "test"), ("org/name", None, "valid")]
    assert "has no field `body`; it has text, 0" in refused(ValueError, data.read_texts, "org/name:::body")
    assert "allowed: name:config:split:field" in refused(ValueError, data.read_texts, "a:b:c:d:e")
    assert "no data set of that name can be loaded (no hub)" in refused(ValueError, data.read_texts, "absent")


def test_pack_joins_and_cuts():
    packed = data.pack([[1, 2, 3], [4], [], [5, 6]], length=4, separator=0)
    assert packed.dtype == np.int32
    assert packed.tolist() == [[1, 2, 3, 0], [4, 0, 0, 5]]


def test_too_little_text_is_refused():
    message = refused(ValueError, data.pack, [[1, 2], [3]], length=8, separator=0)
    assert "2 texts have 5 tokens" in message and "one sequence of 8" in message
    assert "0 texts have 0 tokens" in refused(ValueError, data.pack, [], length=8, separator=0)


@pytest.fixture
def token_rows():
    ids = np.arange(12, dtype=np.int32).reshape(3, 4)
    # A view with strides: safetensors would write its memory, not its values.
    return {"input_ids": ids, "labels": np.where(ids < 8, ids, -100)[:, ::-1]}


def test_token_files_keep_values_and_metadata(tmp_path, token_rows):
    path = tmp_path / "new" / "tokens.safetensors"
    data.save_tokens(path, {**token_rows, "weights": torch.tensor([1.0, 2.0, 3.0])}, {"seed": 3, "from": ["a", "b"]})
    tensors, metadata = data.load_tokens(path)
    assert metadata == {"seed": 3, "from": ["a", "b"]}
    assert tensors["input_ids"].dtype == np.int32 and tensors["weights"].tolist() == [1, 2, 3]
    assert all((tensors[name] == token_rows[name]).all() for name in token_rows)
    assert [file.name for file in path.parent.iterdir()] == ["tokens.safetensors"]


@pytest.mark.parametrize(
    "change",
    [
        {"labels": np.zeros((2, 4))},
        {"input_ids": np.zeros((0, 4)), "labels": np.zeros((0, 4))},
        {"input_ids": np.zeros(3)},
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, token_rows, change):
    message = refused(ValueError, data.save_tokens, tmp_path / "x", {**token_rows, **change})
    assert "`input_ids` [rows, length]" in message and not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_earlier_file(tmp_path, token_rows):
    path = tmp_path / "tokens.safetensors"
    data.save_tokens(path, token_rows)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        message = refused(OSError, data.save_tokens, path, {"input_ids": np.zeros((100, 100), dtype=np.int32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot write" in message and "make room" in message
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_broken_token_files_are_refused(tmp_path, token_rows):
    path = tmp_path / "tokens.safetensors"
    assert "there is no token file" in refused(ValueError, data.load_tokens, path)
    data.save_tokens(path, token_rows)
    whole = path.read_bytes()
    for content in (whole[:-5], whole[:20], b"", whole.replace(b"adaptive", b"somebody")):
        path.write_bytes(content)
        assert "is no whole token file" in refused(ValueError, data.load_tokens, path)


def test_split_is_disjoint_complete_and_repeatable():
    rows = [f"row {index}" for index in range(100)]
    parts = data.split(rows, seed=1, shares={"train": 0.7, "select": 0.2, "certify": 0.1})
    assert {name: len(part) for name, part in parts.items()} == {"train": 70, "select": 20, "certify": 10}
    assert sorted(sum(parts.values(), [])) == sorted(rows)
    assert parts == data.split(rows, seed=1, shares={"train": 0.7, "select": 0.2, "certify": 0.1})
    assert parts != data.split(rows, seed=2, shares={"train": 0.7, "select": 0.2, "certify": 0.1})
    as_array = data.split(np.arange(100), seed=1, shares={"train": 0.7, "select": 0.2, "certify": 0.1})
    assert [f"row {index}" for index in as_array["certify"]] == parts["certify"]


def test_split_draws_the_same_rows_on_every_machine():
    assert data.split(np.arange(20), seed=0, shares={"a": 0.25})["a"].tolist() == [1, 8, 10, 18, 19]


def test_impossible_splits_are_refused():
    assert "their sum at most 1" in refused(ValueError, data.split, [1, 2], 0, {"a": 0.8, "b": 0.3})
    assert "above 0" in refused(ValueError, data.split, [1, 2], 0, {"a": 0.8, "b": 0})
    assert "2 rows" in refused(ValueError, data.split, [1, 2], 0, {"a": 0.9, "b": 0.1})


def test_a_digest_sees_names_types_shapes_and_values_but_no_order():
    first, second = np.arange(6, dtype=np.int32), np.ones((2, 3), dtype=np.float32)
    same = data.digest({"a": first, "b": second})
    assert same == data.digest({"b": torch.from_numpy(second), "a": torch.from_numpy(first)})
    others = [
        {"a": first, "c": second},
        {"a": first, "b": second.astype(np.float64)},
        {"a": first, "b": second.reshape(3, 2)},
        {"a": first[::-1], "b": second},
        {"a": first},
    ]
    assert len({same, *map(data.digest, others)}) == 6
    assert data.digest({"a": torch.tensor(1.0, dtype=torch.bfloat16)}) != data.digest({"a": torch.tensor(1.0)})
    assert data.digest(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.fixture
def calibrate():
    """The script as a module."""
    return script("train/calibrate")


def test_a_conversation_is_asked_up_to_the_users_last_turn(calibrate, tmp_path):
    system, user, said = ({"role": role, "content": role} for role in ("system", "user", "assistant"))
    path = write_rows(
        tmp_path / "x.jsonl",
        {"messages": [system, user, said, user, said]},
        {"messages": [user, said]},
        {"text": "user"},
        {"messages": [system, user, said, user]},
        {"prompt": "2+2?", "answer": "4"},
    )
    assert calibrate.questions(str(path)) == [[system, user, said, user], "user", "2+2?"]
    selection, certifying = calibrate.read_prompts(calibrate.CalibrationConfig("run", str(path)))
    assert len(selection + certifying) == 3 and [system, user, said, user] in selection + certifying
    for messages in ([system, said], [], "hello", ["hello"]):
        write_rows(path, {"messages": messages})
        message = refused(ValueError, calibrate.questions, str(path))
        assert "has no message of the user; give a list of" in message and repr(messages)[:60] in message


@pytest.mark.parametrize(
    "content, part",
    [
        ([{"text": "a"}], "holds a list; wanted an object"),
        ({"select": "abc", "certify": ["d"]}, "`select` of PATH is of the type str; give a list of prompts"),
        ({"select": ["a"], "certify": [3]}, "`certify` of PATH has 3 at place 0, of the type int; a prompt is"),
        ({"select": ["a"], "certify": ["b", {"text": "c"}]}, "has {'text': 'c'} at place 1, of the type dict"),
        ({"select": ["a"], "certify": [["b", "c"]]}, "has ['b', 'c'] at place 0, of the type list; a prompt is"),
        ({"select": ["a"], "certify": []}, "lacks ['certify']; it has ['certify', 'select']"),
    ],
)
def test_what_is_no_prompts_is_refused_before_anything_is_made(calibrate, tmp_path, monkeypatch, content, part):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    assert part.replace("PATH", str(path)) in refused(ValueError, read_parts, path, "select", "certify")
    config = calibrate.CalibrationConfig(str(tmp_path / "run"), str(path))
    assert refused(ValueError, calibrate.read_prompts, config) == refused(
        ValueError, read_parts, path, "select", "certify"
    )
    refused(Exception, calibrate.main, config)  # no such run
    monkeypatch.setattr(EarlyExitModel, "from_pretrained", lambda run: torch.nn.Identity())
    refused(ValueError, calibrate.main, config)
    assert list(tmp_path.iterdir()) == [path]


def test_encode_takes_prompts_of_every_kind_and_refuses_others():
    kinds = [[3, 4], np.array([5, 6]), torch.tensor([7]), (8,)]
    assert encode(kinds, None) == [[3, 4], [5, 6], [7], [8]] and encode(torch.ones(2, 1), None) == [[1], [1]]
    message = [{"role": "user", "content": "a"}]
    assert "`prompts` is of the type str; give a list" in refused(ValueError, encode, "abc", None)
    assert "at place 0, of the type dict" in refused(ValueError, encode, message, None)

    class Bare:
        chat_template = None

    assert "of 1 messages, but" in refused(ValueError, encode, [message], Bare())
