"""What the exported folder's script does around the graphs: text, time, and a system that hides its pages."""

import builtins
from types import SimpleNamespace

import pytest

pytest.importorskip("onnxruntime")

from tokenizers import Tokenizer, decoders, models  # noqa: E402

from adaptive import memory, run  # noqa: E402
from adaptive.sealed import sha256  # noqa: E402
from adaptive.texts import Chat, Texts  # noqa: E402


def test_bytes_that_become_no_character_do_not_end_an_answer(tmp_path):
    words = ["<unk>", "▁a", "<0x0A>", "<0xF0>", "<0x9F>", "▁b", "!"]
    inner = Tokenizer(
        models.BPE({word: id for id, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)  # as in Llama 2, Mistral and Gemma
    inner.save(str(path := tmp_path / "tokenizer.json"))
    add = Texts(path, sha256(path), Chat(None)).stream()
    assert [add(id) for id in (1, 2, 3, 4, 5, 6)] == ["a", "\n", "", "", "\ufffd\ufffd b", "!"]
    add = Texts(path, sha256(path), Chat(None)).stream()
    assert "".join(add(id) for id in (1, 2, 3, 5, 2, 4, 5, 6, 5)) == "a\n\ufffd b\n\ufffd b! b"


def test_the_time_that_found_the_end_of_an_answer_is_no_tokens(monkeypatch):
    now, seen = [0.0], []
    monkeypatch.setattr(run.time, "perf_counter", lambda: now[0])

    def generate(*_, **__):
        for number in range(3):  # two tokens a second apart, and one more that is the end
            now[0] += 1.0
            if number < 2:
                yield SimpleNamespace(text="a", id=1)

    runtime = SimpleNamespace(texts=SimpleNamespace(encode=lambda text: [1]), generate=generate)
    monkeypatch.setattr(run, "stats", lambda *found: seen.append(found[3:]) or {})
    run.answer(runtime, "x", run.PARSER.parse_args(["x", "--json"]), None)
    assert seen == [(1.0, 2.0)]


def test_a_system_that_shows_no_page_table_is_done_without(monkeypatch):
    real = open

    def without(path, *args, **kwargs):
        if str(path) == "/proc/self/pagemap":
            raise PermissionError(13, "Permission denied", path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", without)
    monkeypatch.setattr(memory, "_huge", lambda: 2**21)
    assert memory._filled() == set()
