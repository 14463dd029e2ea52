"""A finished folder on its own: its command line, its callers' mistakes, its threads, and whatever may happen to it."""

import json
import math
import mmap
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import VOCAB
from test_export import compare, made, prompt, tokenizer

from adaptive import memory, sealed, session
from adaptive.export import _theirs, export
from adaptive.folder import beside, certified
from adaptive.policy import BudgetPolicy, DecayingPolicy
from adaptive.run import PARSER, main, settle
from adaptive.runtime import Runtime


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An exported folder that is not to be changed."""
    words = tokenizer()
    words.backend_tokenizer.enable_truncation(2)
    words.backend_tokenizer.enable_padding(length=20)
    out = export(made(), tmp_path_factory.mktemp("export") / "out", "fp32", words)
    assert words.backend_tokenizer.truncation and words.backend_tokenizer.padding, "the caller's is as it was"
    return out


def test_a_folder_can_be_read_by_whoever_it_is_shipped_to(folder):
    assert folder.stat().st_mode & 0o777 == 0o755
    assert "spends about that share" in (folder / "README.md").read_text()


def test_texts_are_neither_cut_nor_padded(folder):
    assert Runtime.load(folder, threads=1).texts.encode("w3 w4 w5") == [3, 4, 5]


def test_nothing_but_numpy_onnxruntime_and_tokenizers_is_needed(folder):
    code = (
        "import sys\nfor name in ('torch', 'transformers', 'adaptive', 'onnx'): sys.modules[name] = None\n"
        "sys.path.insert(0, sys.argv.pop(1))\nimport run\nsys.exit(run.main(sys.argv[1:]))"
    )
    words = [sys.executable, "-I", "-c", code, str(folder), "w3 w4 w5", "--max-new-tokens", "7", "--json"]
    done = subprocess.run([*words, "--threads", "1"], capture_output=True, text=True, cwd=folder.parent, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ids"] == [token.id for token in Runtime.load(folder, 1).generate([3, 4, 5], 7)]
    assert found["depths"] == [4] * 7 and found["relative_flops"] == 1.0 and found["tokens_per_second"] > 0


def test_the_command_line(folder):
    def run(*words, text=None):
        environment = {**os.environ, "PYTHONPATH": ""}
        return subprocess.run([sys.executable, str(folder / "run.py"), "--threads", "1", *words], capture_output=True,
                              input=text, timeout=60, cwd=folder, env=environment)  # fmt: skip

    done = run("w3 w4", "--stats", "--max-new-tokens", "5")
    assert done.returncode == 0 and b"mean depth 4.0 of 4" in done.stderr
    assert run("-", "--max-new-tokens", "5", text=b"w3 w4").stdout == done.stdout
    for words, said in (
        (["w1", "--policy", "some"], b"not one of full, certified, budget"),
        (["w1", "--policy", "budget=0.5"], b"exported without a survey"),
        (["w1", "--max-new-tokens", "500"], b"do not fit the context of 128"),
        (["--chat", "hello"], b"no chat template"),
        ([b"\xff\xfe"], b"not UTF-8"),
        (["  "], b"the prompt is empty"),
    ):
        done = run(*words)
        assert done.returncode == 1 and said in done.stderr and b"Traceback" not in done.stderr, done.stderr
    assert run("-", text=b"\xff").returncode == 1
    words = [sys.executable, str(folder / "run.py"), "--threads", "1", "w3 w4", "--max-new-tokens", "5"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as early:
        early.stdout.close()  # `| head -0`
        assert early.stderr.read() == b"" and early.wait(60) == 141
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)


def test_the_command_line_says_what_it_does(folder, monkeypatch, capsys):
    rest = ["--folder", str(folder), "--threads", "1", "--max-new-tokens", "2"]
    assert main(["w3", "--json", *rest]) == 0
    assert json.loads(capsys.readouterr().out)["policy"] == "full"
    monkeypatch.setattr(sys, "stdin", None)
    for words, said in ((["w3", "--system", "be good"], "give that, too"), (["-"], "input is closed"),
                        (["--chat"], "input is closed")):  # fmt: skip
        with pytest.raises(SystemExit):
            main([*words, *rest])
        assert said in capsys.readouterr().err
    for words, most, noted in (([], 9, 0), (["--max-new-tokens", "9"], 9, 0), (["--max-new-tokens", "10"], 10, 1),
                               (["--max-new-tokens", "10", "--policy", "full"], 10, 0)):  # fmt: skip
        settle(args := PARSER.parse_args(["w3", *words]), {"max_new_tokens": 9})
        assert args.max_new_tokens == most
        assert capsys.readouterr().err.count("certified are answers of up to 9") == noted
    settle(args := PARSER.parse_args(["w3"]), None)
    assert args.max_new_tokens == 128


def test_policies_that_look_back_leave_where_torch_leaves(folder):
    runtime, model = Runtime.load(folder, threads=1), made()
    depths = [compare(model, runtime, BudgetPolicy((2.0, 2.0), mean_depth)) for mean_depth in (2.0, 2.7, 3.5)]
    assert depths[0] == 2 and depths[1] <= 2.7 < depths[2] <= 3.5
    assert 2 < compare(model, runtime, DecayingPolicy((0.5, 0.5), length=8)) < 4


def test_beside_asks_whatever_a_prompt_says(folder, monkeypatch):
    monkeypatch.setattr("adaptive.folder.load_tokenizer", lambda model: None)
    monkeypatch.setattr("adaptive.folder.encode", lambda prompts, words: [[3, 4]])
    assert beside(made(), folder, ["-w3"], 3).count("\n| folder") == 2
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)


def test_prompts_that_the_folder_would_refuse_certify_nothing(folder):
    asked = [prompt(seed, 5 if seed else 123) for seed in range(8)]
    settings = dict(prompts=asked[:4], selection=asked[4:], budget=0.9, max_new_tokens=6)
    with pytest.raises(ValueError, match="1 of 8 prompts and 6 new tokens do not fit the context of 128"):
        certified(made(), folder, tokenizer(), settings)


def test_mistakes_of_callers(folder):
    runtime = Runtime.load(folder, threads=1)
    for words, said in (
        (dict(prompt=[]), "empty"),
        (dict(prompt=[VOCAB]), "outside the vocabulary"),
        (dict(prompt=[1], max_new_tokens=0), "at least 1"),
        (dict(prompt=[1], temperature=-1), "0 or more"),
        (dict(prompt=[1], policy=[0.5]), "1 thresholds, the model 2 exits"),
        (dict(prompt="\udcff"), "not UTF-8"),
    ):
        with pytest.raises(ValueError, match=said):
            runtime.generate(**words)


def test_the_highest_are_found_through_a_sample():
    generator = np.random.default_rng(0)
    for size, count in ((49152, 1024), (3000, 1024), (200, 24), (200, 199), (64, 3)):
        for scores in (generator.standard_normal(size), np.sort(generator.standard_normal(size)), np.zeros(size)):
            found = session.highest(scores.astype(np.float32), count)
            assert len(set(found.tolist())) == count
            assert np.array_equal(np.sort(scores[found]), np.sort(scores)[-count:])


def test_sampling(folder):
    runtime = Runtime.load(folder, threads=1)

    def sampled(**settings):
        return [token.id for token in runtime.generate([5, 6], 30, **settings)]

    assert sampled(temperature=1.0, seed=1) == sampled(temperature=1.0, seed=1) != sampled(temperature=1.0, seed=2)
    assert sampled(temperature=1.0, top_p=1e-6, seed=1) == sampled() == sampled(temperature=1e-320, seed=1)
    step = next(iter(runtime.generate([5, 6], 1))).step
    generator = np.random.default_rng(0)
    drawn = np.bincount([step.pick(1.0, 1.0, generator) for _ in range(20000)], minlength=VOCAB) / 20000
    expected = np.exp(step.logits - step.logits.max())
    assert np.abs(drawn - expected / expected.sum()).max() < 0.02


def test_many_threads_give_what_one_gives(folder):
    runtime, policy = Runtime.load(folder, threads=1), [0.5, 0.5]

    def answer(seed: int) -> list[tuple[int, int]]:
        return [(token.id, token.depth) for token in runtime.generate(prompt(seed, 5 + seed % 7), 12, policy=policy)]

    requests = range(int(os.environ.get("CONCURRENT_REQUESTS", 60)))
    serial = [answer(seed) for seed in requests]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, requests)) == serial
    assert len({depth for tokens in serial for _, depth in tokens}) > 1


def test_no_mutation_of_the_folder_goes_unnoticed(folder, tmp_path):
    copied, generator = tmp_path / "out", np.random.default_rng(0)
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    refused = 0
    for number in range(200):
        shutil.copytree(folder, copied)
        path = copied / names[number % len(names)]
        raw = bytearray(path.read_bytes())
        kind = number // len(names) % 4
        if kind == 0:
            raw[generator.integers(len(raw))] ^= 1 << generator.integers(8)
            path.write_bytes(raw)
        elif kind == 1:
            path.write_bytes(raw[: generator.integers(len(raw))])
        elif kind == 2:
            path.rename(copied / "elsewhere")
        else:
            path.write_bytes(raw.replace(b"0", b"1") if b"0" in raw else raw + b" ")
        with pytest.raises(ValueError) as error:
            Runtime.load(copied, threads=1)
        refused += path.name in str(error.value) and len(str(error.value)) < 400
        shutil.rmtree(copied)
    assert refused == 200


def test_exits_are_loaded_when_they_are_asked_for(folder, tmp_path):
    copied = tmp_path / "out"
    shutil.copytree(folder, copied)
    runtime = Runtime.load(copied, threads=1)
    before = len(runtime.graphs)
    assert list(runtime.generate(prompt(), 4, policy="full")) and len(runtime.graphs) == before
    # Nobody reaches a score of 2: they are there before anybody leaves.
    assert next(runtime.generate(prompt(), 4, policy=[math.inf, 2])) and "exit_1" in runtime.graphs
    assert "exit_0" not in runtime.graphs
    raw = (copied / "exit_0.bin").read_bytes()
    (copied / "exit_0.bin").write_bytes(raw[::-1])
    with pytest.raises(ValueError, match="exit_0.bin was changed"):
        list(runtime.generate(prompt(), 4, policy=[0, 0]))


def test_newer_formats_and_foreign_folders(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no readable manifest.json"):
        Runtime.load(tmp_path)
    newer = tmp_path / "newer"
    shutil.copytree(folder, newer)
    record = {key: value for key, value in sealed.unseal(folder).items() if key not in ("format", "files")}
    monkeypatch.setattr(sealed, "FORMAT", sealed.FORMAT + 1)
    sealed.seal(newer, record)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="format 4, this runtime reads 3"):
        Runtime.load(newer)
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("years of work")
    (full / "manifest.json").write_text('{"files": [], "name": "another program"}')
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for inside in (".", "..", tmp_path):
        with pytest.raises(ValueError, match="is the folder you are in"):
            export(made(), inside, "fp32", tokenizer())
    with pytest.raises(ValueError, match="holds something that was not exported .manifest.json, thesis.tex.; move it"):
        export(made(), full, "fp32", tokenizer())


def test_only_what_was_exported_is_replaced(folder, tmp_path, monkeypatch, caplog):
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    (out / "__pycache__").mkdir(exist_ok=True)
    assert _theirs(out) == []
    (out / "answers.txt").write_text("of today")
    with pytest.raises(ValueError, match="was not exported .answers.txt.; move it"):
        export(made(), out, "fp32", tokenizer())
    (out / "answers.txt").unlink()
    monkeypatch.setattr("adaptive.export.compare", lambda *_: (out / "answers.txt").write_text("of tomorrow"))
    assert export(made(), out, "fp32", tokenizer()) == out and Runtime.load(out, threads=1)
    assert [path.read_text() for path in tmp_path.glob(".exporting-*.old/answers.txt")] == ["of tomorrow"]
    assert "is now in" in caplog.text


def test_foreign_code_is_refused_and_not_run(folder, tmp_path):
    copied = tmp_path / "out"
    shutil.copytree(folder, copied)
    for name in ("answers", "__pycache__", ".git"):
        (copied / name).mkdir(exist_ok=True)
    (copied / "notes.txt").write_text("import numpy")
    assert Runtime.load(copied, threads=1)
    for name in ("random.py", "numpy.so", "answers/__init__.py"):
        (copied / name).write_text("")
        with pytest.raises(ValueError, match=f"holds {name.partition('/')[0]}, which the export did not write"):
            Runtime.load(copied, threads=1)
        (copied / name).unlink()
    (copied / "numpy.py").write_text("print('run')")
    done = subprocess.run([sys.executable, str(copied / "run.py"), "w3"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "holds numpy.py" in done.stderr
    assert not done.stdout


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="says what is mapped")
def test_mapped_files_may_have_any_name(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff"
    with open(path, "wb") as file:
        file.write(b"12345678")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ):
        assert os.fsdecode(path) in memory._read("/proc/self/maps")


def test_the_tokenizer_is_loaded_when_text_is(folder, tmp_path):
    copied = tmp_path / "out"
    shutil.copytree(folder, copied)
    runtime = Runtime.load(copied, threads=1)
    session.Session(runtime, 12).prefill(prompt())
    assert runtime.texts.loaded is None
    (copied / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json was changed"):
        runtime.texts.encode("w3")


@pytest.mark.skipif(
    not memory._huge() or tuple(map(int, os.uname().release.split(".")[:2])) < (6, 1), reason="huge pages are Linux's"
)
def test_what_is_full_is_moved_to_huge_pages_and_stays_as_it_was():
    before, count = memory._filled(), 6 * memory._huge() // 8
    parts = [np.arange(4096, dtype=np.float64) + n for n in range(count // 4096)]  # the heap, in small pieces
    fresh = memory._filled() - before
    assert len(fresh) > 2, "six of them were written"
    memory.widen(fresh)
    assert all(part[0] == n and part[-1] == n + 4095 for n, part in enumerate(parts))
    pages = dict.fromkeys(fresh, 0)
    start = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"(\w+)-(\w+) ", line):
            start, end = (int(number, 16) for number in found.groups())
        elif line.startswith("AnonHugePages:") and int(line.split()[1]):
            pages |= {place: 1 for place in fresh if start <= place < end}
    assert sum(pages.values()) > len(pages) / 2  # a machine may have few to give
