"""Export a run to one folder that generates without torch.

python -m adaptive.export runs/demo out --precision int4 --prompts runs/demo/text/prompts.json
cd out; pip install --no-deps -r requirements.txt; python run.py "Once upon a time"

Quantized exits are other exits: thresholds are calibrated anew on the exported graphs, with --prompts (as
train/calibrate.py reads them) and, where no flag says otherwise, what the run's own certificate was asked for. Without
prompts nothing is certified, and the folder's `certified` policy is the full depth.
"""

from __future__ import annotations

import argparse

PRECISIONS = {"fp32": 32, "int8": 8, "int4": 4}
PARSER = argparse.ArgumentParser(
    prog="python -m adaptive.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
PARSER.add_argument("run", help="folder of a trained model")
PARSER.add_argument("out", help="folder to write; must not hold anything else")
PARSER.add_argument("--precision", choices=sorted(PRECISIONS), default="int4", help="of the weights; int4")
PARSER.add_argument("--prompts", help='.json file of {"select": [...], "certify": [...]} to calibrate on')
PARSER.add_argument("--certify", type=int, metavar="N", help="certify on the first N of these prompts; all")
PARSER.add_argument("--risk", type=float, help="largest expected harm per token")
PARSER.add_argument("--budget", type=float, help="FLOPs relative to full depth, instead of a risk")
PARSER.add_argument("--max-new-tokens", type=int, help="length of the answers vouched for")

if __name__ == "__main__":
    ARGS = PARSER.parse_args()  # before the heavy imports: --help and a mistyped flag answer at once

import importlib.metadata
import json
import logging
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from adaptive import __version__, recipes
from adaptive.card import folder_card
from adaptive.certify import load_tokenizer
from adaptive.policy import ExitPolicy
from adaptive.prompts import encode
from adaptive.sealed import MANIFEST, seal, unseal
from adaptive.storage import model_digest

logger = logging.getLogger(__name__)
SOURCES = ("policy", "costs", "sealed", "texts", "memory", "session", "runtime", "run")  # what the folder runs on
BYTES = {"fp32": 4.0, "int8": 1 + 4 / 32, "int4": 0.5 + 4 / 32}  # of a weight, its share of scales included
# Least correlation of the exported logits with torch's. It tells a graph that is wired wrongly, not a coarse one.
ALIKE = {"fp32": 0.9999, "int8": 0.98, "int4": 0.2}


def export(model, out: str | Path, precision: str = "int4", tokenizer=None, calibrate: dict | None = None) -> Path:
    """Writes a folder that generates without torch, and returns its path.

    Args:
        model: the `EarlyExitModel`.
        out: folder to write; a folder exported earlier is replaced when the new one is complete.
        precision: of the weights: fp32, int8 or int4. Norms and gates stay in float32.
        tokenizer: of the backbone; loaded from its folder if None.
        calibrate: arguments of `adaptive.calibrate` (`prompts`, `risk`, `selection`, ...) to certify the exported
            graphs; None certifies nothing.

    Raises:
        ValueError: an unknown precision, a family or head without an exported form, a folder that holds something
            else, a risk that no policy met.
    """
    out = Path(out)
    _check(model, out, precision)
    tokenizer = tokenizer or load_tokenizer(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".exporting-", dir=out.parent))
    try:
        from adaptive.parts import Writer

        record = Writer(model, fresh, PRECISIONS[precision]).write()
        record |= _describe(model, precision, tokenizer, record["exits"])
        tokenizer.backend_tokenizer.save(str(fresh / "tokenizer.json"))
        _write_sources(fresh)
        record |= {"certificate": None, "frontier": []}
        _finish(fresh, record)
        compare(model, fresh, precision)
        if calibrate is not None:
            from adaptive.folder import certified

            record |= certified(model, fresh, tokenizer, calibrate)
            _finish(fresh, record)
        fresh.chmod(0o755)  # a temporary folder is its maker's alone
        old = fresh.with_name(fresh.name + ".old")
        if out.exists():
            os.replace(out, old)
        try:
            os.replace(fresh, out)
        except OSError:
            if old.exists():
                os.replace(old, out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return out


def _check(model, out: Path, precision: str) -> None:
    problems = []
    if precision not in PRECISIONS:
        problems.append(f"`precision`={precision!r} is not one of {', '.join(PRECISIONS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir()) and not (out / MANIFEST).exists()):
        problems.append(f"'{out}' holds something that was not exported; choose another folder")
    try:
        recipes.require_known(model.view.config)
    except ValueError as error:
        problems.append(str(error).removeprefix("export: "))
    if missing := [name for name in ("onnx", "onnxruntime") if not _installed(name)]:
        problems.append(f"{' and '.join(missing)} not installed; pip install 'adaptive-exits[export]'")
    if problems:
        raise ValueError("export: " + "; ".join(problems))


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _describe(model, precision: str, tokenizer, entries: list[dict]) -> dict:
    """Returns what the manifest says beside the graphs, whose `entries` say what vocabulary each exit got."""
    costs, eos = model.costs, model.generation_config.eos_token_id
    exits = [{**exit, "vocab": costs.shape["vocab"]} if entry["entries"] == "all" else exit
             for exit, entry in zip(costs.exits, entries, strict=True)]  # fmt: skip
    name = str(model.view.inner.name_or_path or "")
    return {
        "name": Path(name).name if Path(name).is_dir() else name or "model",
        "family": model.view.config.model_type,
        "precision": precision,
        "eos": sorted({eos} if isinstance(eos, int) else set(eos or [])),
        "chat": chat_template(tokenizer),
        "costs": {"shape": {**costs.shape, "bytes_per_weight": BYTES[precision]}, "exits": exits},
        "model_digest": model_digest(model),
        "versions": {"adaptive-exits": __version__}
        | {name: importlib.metadata.version(name) for name in ("onnx", "onnxruntime", "torch", "transformers")},
    }


def chat_template(tokenizer) -> dict | None:
    """Returns a tokenizer's chat template as `texts.Chat` renders it.

    What it writes around each role is read off a rendered conversation. Where conversations put together from these
    pieces are not what the template writes, the template itself is kept, and the runtime needs jinja2.
    """
    if tokenizer.chat_template is None:
        return None

    def render(*messages: tuple[str, str], answer: bool = True) -> str:
        talk = [{"role": role, "content": content} for role, content in messages]
        return tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=answer)

    from adaptive.texts import Chat

    whole = {"jinja": tokenizer.chat_template, "bos_token": tokenizer.bos_token or "",
             "eos_token": tokenizer.eos_token or ""}  # fmt: skip
    marks = [("system", "\x01s"), ("user", "\x01u"), ("assistant", "\x01a"), ("user", "\x01v")]
    try:
        text = render(*marks, answer=False)
        place = [text.index(content) for _, content in marks]
        end_user = _common(text[place[1] + 2 :], text[place[3] + 2 :])
        before_user = text[: place[3]][-_common_end(text[: place[1]], text[: place[3]]) :]
        pieces = {
            "roles": {
                "system": [text[: place[0]], text[place[0] + 2 : place[1] - len(before_user)]],
                "user": [before_user, end_user],
                "assistant": [text[place[1] + 2 + len(end_user) : place[2]],
                              text[place[2] + 2 : place[3] - len(before_user)]],
            },
            "answer": render(*marks).removeprefix(text),
        }  # fmt: skip
        pieces["start"] = render(("user", "\x01u")).removesuffix(before_user + "\x01u" + end_user + pieces["answer"])
        talks = [marks, marks[1:], marks[1:2], [("user", " a \n"), ("assistant", " b\n"), ("user", "c d")]]
        for talk in talks:
            messages = [{"role": role, "content": content} for role, content in talk]
            if Chat(pieces).render(messages) != render(*talk):
                return whole
    except Exception:  # templates raise what they like: no system role, say
        return whole
    return pieces


def _common(a: str, b: str) -> str:
    return os.path.commonprefix([a, b])


def _common_end(a: str, b: str) -> int:
    return len(os.path.commonprefix([a[::-1], b[::-1]]))


def _write_sources(folder: Path) -> None:
    """Copies the runtime; there its files import each other without the package around them."""
    here = Path(__file__).parent
    for name in SOURCES:
        text = (here / f"{name}.py").read_text(encoding="utf-8")
        (folder / f"{name}.py").write_text(re.sub(r"\bfrom adaptive\.(\w+) import", r"from \1 import", text))


def _finish(folder: Path, record: dict) -> None:
    """Writes the card and the requirements, and seals the folder."""
    record = json.loads(json.dumps(record, allow_nan=False))
    needs = ["numpy>=2", f"onnxruntime>={record['versions']['onnxruntime']}", "tokenizers"]
    needs += ["jinja2", "markupsafe"] if record["chat"] and "jinja" in record["chat"] else []
    (folder / "requirements.txt").write_text("\n".join(needs) + "\n")
    size = sum(path.stat().st_size for path in folder.iterdir())
    (folder / "README.md").write_text(folder_card(record, size))
    seal(folder, record)


@torch.no_grad()
def compare(model, folder: Path, precision: str) -> float:
    """Returns the correlation of the exported full depth's logits with torch's, on a few tokens.

    Raises:
        ValueError: it is so low that the graphs must be wrong.
    """
    from adaptive.runtime import Runtime
    from adaptive.session import Session

    runtime = Runtime.load(folder, threads=1)
    ids = np.random.default_rng(0).integers(0, model.view.vocab_size, 24)
    found = runtime.logits(Session(runtime, len(ids)).prefill(ids.tolist()))
    theirs = model.view.model(input_ids=torch.as_tensor(ids[None], device=model.device), use_cache=False).logits[0]
    alike = float(np.corrcoef(found.ravel(), theirs.float().cpu().numpy().ravel())[0, 1])
    if not alike >= ALIKE[precision]:
        raise ValueError(
            f"export: the exported logits correlate with torch's by {alike:.4f} only, at {precision} at least "
            f"{ALIKE[precision]} is expected; please report this model"
        )
    return alike


def main(args: argparse.Namespace) -> None:
    """Runs the command line."""
    from adaptive.model import EarlyExitModel

    model = EarlyExitModel.from_pretrained(args.run)
    calibrate = None
    if args.prompts is not None:
        parts = json.loads(Path(args.prompts).read_text())
        if missing := {"select", "certify"} - set(parts):
            raise ValueError(f"--prompts {args.prompts} lacks {sorted(missing)}; it has {sorted(parts)}")
        calibrate = {"prompts": parts["certify"][: args.certify], "selection": parts["select"]} | _asked(
            model.certificate, args
        )
    elif args.risk is not None or args.budget is not None or args.max_new_tokens is not None:
        raise ValueError("--risk, --budget and --max-new-tokens are for calibrating: give --prompts, too")
    out = export(model, args.out, args.precision, calibrate=calibrate)
    print(f"wrote {out}" + ("" if calibrate else ", not certified: no --prompts"))
    if calibrate is not None:
        asked = [prompt for prompt in parts.get("report") or parts["certify"] if isinstance(prompt, str)]
        print(beside(model, out, asked[:4], calibrate.get("max_new_tokens", 64)) if asked else "")


def beside(model, out: Path, prompts: list[str], new: int) -> str:
    """Returns a Markdown table of the model and its folder: size, decoding speed at batch 1, certified harm.

    Args:
        model: the `EarlyExitModel`, as torch runs it.
        out: the folder, run as its users run it: in a process of its own.
        prompts: what a user says; every way to generate answers each in turn.
        new: most tokens of an answer.
    """
    threads, tokenizer = torch.get_num_threads(), load_tokenizer(model)
    chat = ["--chat"] if tokenizer.chat_template is not None else []
    words = [
        sys.executable,
        str(out / "run.py"),
        "--json",
        "--max-new-tokens",
        str(new),
        "--threads",
        str(threads),
        *chat,
    ]

    def in_torch(prompt: str, policy) -> float:
        """Returns tokens per second behind the first."""
        ids, seconds = torch.tensor(encode([prompt], tokenizer), device=model.device), []
        for count in (1, new):
            began = time.perf_counter()
            made = model.generate(input_ids=ids, max_new_tokens=count, do_sample=False, policy=policy)
            seconds.append(time.perf_counter() - began)
        return (made.shape[1] - ids.shape[1] - 1) / (seconds[1] - seconds[0])

    def in_folder(prompt: str, policy: str) -> float:
        done = subprocess.run([*words, "--policy", policy, prompt], capture_output=True, text=True, check=True)
        return json.loads(done.stdout).get("tokens_per_second", 0.0)

    record, torchs = unseal(out), sum(tensor.nbytes for tensor in model.state_dict().values())
    size, full = sum(path.stat().st_size for path in out.iterdir() if path.is_file()), ExitPolicy.full(model.num_exits)
    theirs, ours = model.certificate, record["certificate"]
    ways = {
        "torch, full depth": (torchs, None, lambda prompt: in_torch(prompt, full)),
        "torch, its policy": (torchs, theirs and theirs.certified, lambda prompt: in_torch(prompt, model.policy)),
        "folder, full depth": (size, None, lambda prompt: in_folder(prompt, "full")),
        "folder, certified": (size, ours and ours["certified"], lambda prompt: in_folder(prompt, "certified")),
    }
    speeds = [[way[2](prompt) for way in ways.values()] for prompt in prompts]
    lines = ["| | MB | tokens/s | certified harm |", "| --- | --- | --- | --- |"]
    for (name, (megabytes, harm, _)), found in zip(ways.items(), zip(*speeds)):
        bound = "-" if harm is None else f"{harm:.4f}"
        lines.append(f"| {name} | {megabytes / 1e6:.0f} | {statistics.median(found):.1f} | {bound} |")
    return "\n".join([*lines, "", f"decoding at batch 1, {threads} threads, median of {len(prompts)} prompts"])


def _asked(certificate, args) -> dict:
    """Returns what to certify: the run's own request, but for what flags say."""
    asked = {} if certificate is None else {
        name: getattr(certificate, name) for name in ("delta", "harm", "bound", "max_new_tokens", "seed")
    }  # fmt: skip
    if certificate is not None and certificate.kind == "budget" and args.risk is None and args.budget is None:
        raise ValueError("export: the run is certified for a budget, which it does not tell; give --budget or --risk")
    if certificate is not None:
        asked |= {"risk": certificate.epsilon} if certificate.kind == "risk" else {}
        asked |= {"tolerance": certificate.tolerance} if certificate.tolerance is not None else {}
    flags = {"risk": args.risk, "budget": args.budget, "max_new_tokens": args.max_new_tokens}
    return asked | {name: value for name, value in flags.items() if value is not None}


if __name__ == "__main__":
    main(ARGS)
