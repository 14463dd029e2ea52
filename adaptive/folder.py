"""An exported folder in the place of a model, for `calibrate`: prompts, answers and judge on its own graphs; and beside
the model that it came from."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from adaptive import ranking
from adaptive.calibration import Certificate
from adaptive.certify import calibrate, load_tokenizer
from adaptive.costs import Costs
from adaptive.policy import ExitPolicy, Trace
from adaptive.prompts import encode
from adaptive.runtime import Runtime, Token
from adaptive.sealed import unseal
from adaptive.session import Session
from adaptive.survey import Survey, survey

logger = logging.getLogger(__name__)
CALL = 10**6  # weights that are multiplied in the time that calling a graph takes, beside its products


class Folder:
    """What `calibrate` asks of a model, answered by an exported folder. Rows are generated side by side in threads.

    Its costs are FLOPs in which calls count, too (`CALL`), of heads and fills: thresholds are to save time, and next to
    4 bit products a call is not for nothing.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path):
        self.path = path
        self.runtime = Runtime.load(path, threads=1)
        manifest = self.runtime.manifest
        self.depths, self.layers = self.runtime.depths, manifest["layers"]
        self.num_exits, self.num_layers = len(self.depths), self.layers
        exits = [{**exit, "head": exit["head"] + 2 * CALL} for exit in manifest["costs"]["exits"]]
        self.costs = Costs(manifest["costs"]["shape"], exits)
        self.generation_config = SimpleNamespace(pad_token_id=0)
        self.device, self.view, self.certificate = torch.device("cpu"), self, None
        self.workers = ThreadPoolExecutor(os.cpu_count())

    @property
    def digest(self) -> str:
        """sha256 of the graphs and arrays, by name."""
        files = self.runtime.manifest["files"]
        names = [name for name in sorted(files) if name.endswith((".onnx", ".bin", ".npy"))]
        return hash_of(names, files)

    def certify(self, certificate: Certificate) -> None:
        """Takes a certificate."""
        self.certificate = certificate

    def generate(self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, policy: ExitPolicy,
                 probe: bool = False, **ignored):  # fmt: skip
        """Returns `.sequences` [rows, prompt + new] and `.trace` of greedy answers, as `EarlyExitModel.generate`.

        Args:
            input_ids: [rows, prompt], left-padded.
            attention_mask: [rows, prompt].
            max_new_tokens: most tokens of an answer.
            policy: who leaves where.
            probe: generate at full depth and record what every exit would have said.
            **ignored: what only matters to transformers.
        """
        prompts = [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
        one = lambda prompt: self._answer(prompt, max_new_tokens, policy, probe)  # noqa: E731
        answers, traces = zip(*self.workers.map(one, prompts), strict=True)
        longest = max(map(len, answers))
        padded = torch.tensor([answer + [0] * (longest - len(answer)) for answer in answers])
        return SimpleNamespace(sequences=torch.cat([input_ids, padded], dim=1), trace=Trace.join(traces))

    def _answer(self, prompt: list[int], max_new_tokens: int, policy, probe: bool) -> tuple[list[int], Trace]:
        session, eos = Session(self.runtime, len(prompt) + max_new_tokens), self.runtime.manifest["eos"]
        session.prefill(prompt, keep=False)
        ids, tokens, regrets = [], [], []
        while len(ids) < max_new_tokens and not (ids and ids[-1] in eos):
            step = session.step(policy, ids[-1] if ids else None, probe)
            # See `losses.regret`.
            regrets.append([step.logits.max() - step.logits[said] for said in step.said])
            ids.append(step.pick())
            tokens.append(Token(ids[-1], "", 0, 0.0, step))
        trace = self.runtime.trace(tokens, len(prompt))
        trace.regret = np.array([regrets], np.float32) if probe else None
        return ids, trace

    def start(self, ids: Tensor, mask: Tensor, positions: Tensor | None, cache: None) -> tuple[Tensor, Tensor]:
        """Returns what `run` needs; part of a backbone's view, as the judge sees it."""
        return ids, mask

    def run(self, ids: Tensor, mask: Tensor, first: int, last: int) -> Tensor:
        """Returns full-depth states [rows, tokens, hidden], normed, of rows [rows, tokens], each in one teacher-forced
        pass."""
        prompts = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
        states = list(self.workers.map(lambda prompt: Session(self.runtime, len(prompt)).prefill(prompt), prompts))
        out = torch.zeros(*ids.shape, self.runtime.manifest["shape"]["hidden"])
        for row, state in enumerate(states):
            out[row, -len(state) :] = torch.from_numpy(state)
        return out

    def norm(self, states: Tensor) -> Tensor:
        """Returns the states: `run` has normed them."""
        return states

    def logits(self, states: Tensor) -> Tensor:
        """Returns full-depth logits [tokens, vocabulary] of states [tokens, hidden]."""
        return torch.from_numpy(self.runtime.logits(states.numpy()))


def hash_of(names: Sequence[str], files: dict) -> str:
    """Returns one digest of several files' names and digests."""
    from adaptive.data import digest

    return digest("\n".join(f"{name} {files[name]}" for name in names).encode())


def certified(model, path: Path, tokenizer, settings: dict) -> dict:
    """Returns what calibration adds to a folder's manifest: `certificate`, and the `frontier` that budgets choose from.

    Args:
        model: the `EarlyExitModel` that was exported.
        path: the folder.
        tokenizer: of the backbone.
        settings: arguments of `calibrate`.

    Raises:
        ValueError: prompts that the folder would refuse; see `calibrate` for others.
    """
    folder, settings = Folder(path), dict(settings)
    prompts, chosen = encode(settings.pop("prompts"), tokenizer), settings.pop("selection", None)
    length, limit = settings.get("max_new_tokens", 64), folder.runtime.manifest["max_context"] or math.inf
    asks = chosen is not None and not isinstance(chosen, Survey)
    choosing = encode(chosen, tokenizer) if asks else []
    if long := sum(len(prompt) + length > limit for prompt in [*prompts, *choosing]):
        raise ValueError(
            f"export: {long} of {len(prompts) + len(choosing)} prompts and {length} new tokens do not fit the context "
            f"of {limit}, so the folder would not answer them; leave them out or lower max_new_tokens"
        )
    if asks:
        chosen = survey(folder, choosing, length, settings.get("batch_size", 32))
    found = calibrate(folder, prompts, selection=chosen, **settings)
    found.versions["onnxruntime"] = importlib.metadata.version("onnxruntime")
    if found.kind == "risk" and found.saved <= 0:
        logger.warning("gates and heads would take longer than leaving saves: the certified policy never leaves")
        found.thresholds, found.saved = [math.inf] * folder.num_exits, 0.0  # what harms less than what was certified
    values = asdict(found)
    values["thresholds"] = [None if math.isinf(t) else float(t) for t in found.thresholds]
    frontier = []
    if chosen is not None:
        harms = chosen.harms(found.harm, found.tolerance or 0.0)
        for point in ranking.frontier(chosen.scores, harms, chosen.costs, chosen.full_cost, chosen.rows):
            cuts = [None if math.isinf(t) else float(t) for t in point.thresholds]
            cost = float(point.cost / chosen.full_cost)
            frontier.append({"cost": cost, "harm": float(point.harm), "thresholds": cuts})
    return {"certificate": values, "frontier": frontier}


def beside(model, out: Path, prompts: list[str], new: int) -> str:
    """Returns a Markdown table of the model and its folder: size, decoding speed at batch 1, certified harm.

    Args:
        model: the `EarlyExitModel`, as torch runs it.
        out: the folder, run as its users run it: in a process of its own.
        prompts: what a user says; every way to generate answers each in turn.
        new: most tokens of an answer.
    """
    record, threads, tokenizer = unseal(out), torch.get_num_threads(), load_tokenizer(model)
    words = [sys.executable, str(out / "run.py"), "-", *["--chat"] * bool(record["chat"]), "--json"]
    words += ["--max-new-tokens", str(new), "--threads", str(threads)]

    def in_torch(prompt: str, policy) -> float:
        """Returns tokens per second behind the first."""
        ids, seconds = torch.tensor(encode([prompt], tokenizer), device=model.device), []
        for count in (1, new):
            began = time.perf_counter()
            made = model.generate(input_ids=ids, max_new_tokens=count, do_sample=False, policy=policy)
            seconds.append(time.perf_counter() - began)
        return (made.shape[1] - ids.shape[1] - 1) / (seconds[1] - seconds[0])

    def in_folder(prompt: str, policy: str) -> float:
        """Returns what the folder's own program says that it made."""
        environment = {**os.environ, "PYTHONUTF8": "1"}
        done = subprocess.run([*words, "--policy", policy], input=prompt.encode(), stdout=subprocess.PIPE, check=True,
                              env=environment)  # fmt: skip
        return json.loads(done.stdout).get("tokens_per_second", 0.0)

    torchs = sum(tensor.nbytes for tensor in model.state_dict().values())
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
