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
PARSER.add_argument("out", help="folder to write; must not hold anything that was not exported")
PARSER.add_argument("--precision", choices=sorted(PRECISIONS), default="int4", help="of the weights; int4")
PARSER.add_argument("--compact", action="store_true", help="without the second copy of weights, for long prompts")
PARSER.add_argument("--prompts", help='.json file of {"select": [...], "certify": [...]} to calibrate on')
PARSER.add_argument("--certify", type=int, metavar="N", help="certify on the first N of these, at least 1; all")
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
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from adaptive import __version__, recipes
from adaptive.card import folder_card
from adaptive.certify import load_tokenizer
from adaptive.sealed import MANIFEST, foreign, seal
from adaptive.storage import model_digest
from adaptive.texts import Chat

logger = logging.getLogger(__name__)
SOURCES = ("policy", "costs", "sealed", "texts", "memory", "session", "runtime", "run")  # what the folder runs on
BYTES = {"fp32": 4.0, "int8": 1 + 4 / 32, "int4": 0.5 + 4 / 32}  # of a weight, its share of scales included
# Least correlation of the exported logits with torch's. It tells a graph that is wired wrongly, not a coarse one.
ALIKE = {"fp32": 0.9999, "int8": 0.98, "int4": 0.2}
MARKS = [("system", "\x01s"), ("user", "\x01u"), ("assistant", "\x01a"), ("user", "\x01v")]
TALKS = [MARKS, MARKS[1:], MARKS[1:2], [("user", " <é> \n"), ("assistant", " b\n"), ("user", "c 'd'")]]


def export(model, out: str | Path, precision: str = "int4", tokenizer=None, calibrate: dict | None = None,
           compact: bool = False) -> Path:  # fmt: skip
    """Writes a folder that generates without torch, and returns its path.

    Args:
        model: the `EarlyExitModel`.
        out: folder to write; a folder exported earlier, in which nothing else lies, is replaced when the new one is
            complete.
        precision: of the weights: fp32, int8 or int4. Norms and gates stay in float32.
        tokenizer: of the backbone; loaded from its folder if None.
        calibrate: arguments of `adaptive.calibrate` (`prompts`, `risk`, `selection`, ...) to certify the exported
            graphs; None certifies nothing.
        compact: leave out the second copy of quantized blocks, which reads prompts of 256 tokens and more fast.

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

        record = Writer(model, fresh, PRECISIONS[precision], compact).write()
        record |= _describe(model, precision, tokenizer, record["exits"])
        _write_tokenizer(tokenizer, fresh / "tokenizer.json")
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
        if old.exists() and not _theirs(old):
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():
            logger.warning("what came into '%s' during the export and is not of it is now in '%s'", out, old)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return out


def _check(model, out: Path, precision: str) -> None:
    problems = []
    if precision not in PRECISIONS:
        problems.append(f"`precision`={precision!r} is not one of {', '.join(PRECISIONS)}")
    if out.exists() and (theirs := _theirs(out)):
        few = ", ".join(theirs[:5])
        problems.append(f"'{out}' holds something that was not exported ({few}); move it, or choose another folder")
    if out.exists() and (os.path.ismount(out) or Path.cwd().is_relative_to(out.resolve())):
        problems.append(f"'{out}' is the folder you are in, or a mounted one, which cannot be replaced; name one in it")
    try:
        recipes.require_known(model.view.config)
    except ValueError as error:
        problems.append(str(error).removeprefix("export: "))
    if missing := [name for name in ("onnx", "onnxruntime") if not _installed(name)]:
        problems.append(f"{' and '.join(missing)} not installed; pip install 'adaptive-exits[export]'")
    if problems:
        raise ValueError("export: " + "; ".join(problems))


def _theirs(out: Path) -> list[str]:
    """Returns the names of what was not exported in a folder that may have been: all, where no manifest says."""
    if not out.is_dir():
        return [out.name]
    try:
        record = json.loads((out / MANIFEST).read_bytes())
    except (OSError, ValueError):
        record = None
    if isinstance(record, dict) and {"sha256", "format", "files"} <= set(record):  # of any format, damaged ones too
        return foreign(out, record["files"])
    return sorted(path.name for path in out.iterdir())


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
    """Returns a tokenizer's chat template as `texts.Chat` renders it; None if it has none, or one that `Chat` cannot.

    What it writes around each role is read off a rendered conversation. Where conversations put together from these
    pieces are not what the template writes, or it asks for the date, the template itself is kept, and the runtime needs
    jinja2.
    """
    if tokenizer.chat_template is None:
        return None

    def render(*messages: tuple[str, str], answer: bool = True) -> str:
        return tokenizer.apply_chat_template(_talk(messages), tokenize=False, add_generation_prompt=answer)

    template = tokenizer.get_chat_template()
    if "strftime_now" not in template:  # pieces would say forever what day it was exported
        try:
            pieces = _pieces(render)
            if _fault(pieces, render) is None:
                return pieces
        except Exception:  # templates raise what they like: no system role, say
            pass
    whole = {**tokenizer.special_tokens_map, "jinja": template}
    if fault := _fault(whole, render):
        logger.warning("exported without chat, as its template needs transformers: %s", fault)
        return None
    return whole


def _talk(messages: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]


def _pieces(render: Callable) -> dict:
    """Returns what a template writes around the messages of each role, if it depends on nothing else."""
    text = render(*MARKS, answer=False)
    place = [text.index(content) for _, content in MARKS]
    end_user = _common(text[place[1] + 2 :], text[place[3] + 2 :])
    before_user = text[: place[3]][-_common_end(text[: place[1]], text[: place[3]]) :]
    pieces = {
        "roles": {
            "system": [text[: place[0]], text[place[0] + 2 : place[1] - len(before_user)]],
            "user": [before_user, end_user],
            "assistant": [text[place[1] + 2 + len(end_user) : place[2]],
                          text[place[2] + 2 : place[3] - len(before_user)]],
        },
        "answer": render(*MARKS).removeprefix(text),
    }  # fmt: skip
    start = render(MARKS[1]).removesuffix(before_user + MARKS[1][1] + end_user + pieces["answer"])
    return {**pieces, "start": start}


def _fault(template: dict, render: Callable) -> str | None:
    """Returns in what `Chat` differs from the tokenizer on the conversations that the latter renders, or None."""
    rendered = 0
    for talk in TALKS:
        try:
            theirs = render(*talk)
        except Exception:
            continue
        try:
            ours = Chat(template).render(_talk(talk))
        except ValueError as error:
            return str(error)
        if ours != theirs:
            return f"{ours!r} is written for {theirs!r}"
        rendered += 1
    return None if rendered else "it renders nothing"


def _common(a: str, b: str) -> str:
    return os.path.commonprefix([a, b])


def _common_end(a: str, b: str) -> int:
    return len(os.path.commonprefix([a[::-1], b[::-1]]))


def _write_tokenizer(tokenizer, path: Path) -> None:
    """Writes a tokenizer that gives all of a text and nothing else, whatever training had it cut off and padded to."""
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.no_truncation()
    inner.no_padding()
    inner.save(str(path))


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
    needs += ["jinja2>=3.1.6", "markupsafe"] if record["chat"] and "jinja" in record["chat"] else []
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

    if args.certify is not None and args.certify < 1:
        raise ValueError(f"--certify {args.certify}: certify on at least 1 prompt, or leave it out for all of them")
    flags = (args.certify, args.risk, args.budget, args.max_new_tokens)
    if args.prompts is None and any(flag is not None for flag in flags):
        raise ValueError("--certify, --risk, --budget and --max-new-tokens are for calibrating: give --prompts, too")
    model = EarlyExitModel.from_pretrained(args.run)
    calibrate = None
    if args.prompts is not None:
        from adaptive.prompts import read_parts

        selection, certifying = read_parts(args.prompts, "select", "certify")
        calibrate = {"prompts": certifying[: args.certify], "selection": selection} | _asked(model.certificate, args)
    out = export(model, args.out, args.precision, calibrate=calibrate, compact=args.compact)
    print(f"wrote {out}" + ("" if calibrate else ", not certified: no --prompts"))
    if calibrate is not None:
        from adaptive.folder import beside

        reported = json.loads(Path(args.prompts).read_text(encoding="utf-8")).get("report")
        asked = [prompt for prompt in reported or certifying if isinstance(prompt, str)]
        print(beside(model, out, asked[:4], calibrate.get("max_new_tokens", 64)) if asked else "")


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
