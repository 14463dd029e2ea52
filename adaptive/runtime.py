"""Generation with calibrated early exits from an exported folder: numpy, onnxruntime and tokenizers, no torch.

    runtime = Runtime.load("out")
    for token in runtime.generate("Once upon a time", max_new_tokens=64):
        print(token.text, end="", flush=True)

`Runtime.load` executes nothing that lies in the folder: graphs, arrays and a manifest are read, every file's digest is
checked first, and what Python could import from there and was not exported is refused. Who runs or imports the folder's
own .py files, of which this may be one, trusts whoever wrote it, and its `__pycache__`, which nobody checks. One
`Runtime` may be used by many threads at once; each generation is a `Session` with keys and values of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from adaptive.memory import loading
from adaptive.policy import ExitPolicy, Trace
from adaptive.sealed import check, unseal
from adaptive.session import Session, Step
from adaptive.texts import Chat, Texts

_POOL = threading.Lock()
_pool: int | None = None  # threads of the process's pool, once there is one


@dataclass(frozen=True)
class Token:
    """A generated token.

    Attributes:
        id: vocabulary entry.
        text: what it adds to the answer; may be empty in the middle of a character.
        depth: blocks that were run for it.
        score: what the gate said that let it out, or the last one asked; NaN if none was.
        step: everything that happened, for `Runtime.trace`.
    """

    id: int
    text: str
    depth: int
    score: float
    step: Step


class Graphs(dict):
    """onnxruntime sessions by name. Those of exits are made when they are first asked for: what no policy opens takes
    no memory.

    Args:
        folder: that the graphs lie in.
        files: digests of its files, by name.
        options: of the sessions.
    """

    def __init__(self, folder: Path, files: dict[str, str], options: onnxruntime.SessionOptions):
        super().__init__()
        self.folder, self.files, self.options, self.making = folder, files, options, threading.Lock()

    def make(self, name: str) -> None:
        """Makes a session."""
        path = str(self.folder / f"{name}.onnx")
        self[name] = onnxruntime.InferenceSession(path, self.options, ["CPUExecutionProvider"])

    def __missing__(self, name: str) -> onnxruntime.InferenceSession:
        with self.making:
            if name not in self:  # another thread may have been here
                both = (f"{name}.onnx", f"{name}.bin")
                check(self.folder, {file: self.files[file] for file in both if file in self.files})
                # Decoding reads all weights for every token, a prompt once for many: pages of any size do for that.
                with nullcontext() if name.startswith("prompt_") else loading(self.folder):
                    self.make(name)
        return self[name]


class Embedding:
    """Rows of the vocabulary, read from their file as they are asked for.

    Mapped, most of 28 MB would count as memory after a short prompt: systems map large pieces around what is touched.

    Args:
        folder: that they lie in.
        factor: that they are multiplied by.
    """

    def __init__(self, folder: Path, factor: float):
        scale, path = folder / "embedding_scale.npy", folder / "embedding.npy"
        self.rows = np.load(path, mmap_mode="r", allow_pickle=False)
        self.scales = np.load(scale, allow_pickle=False) if scale.exists() else np.ones(len(self.rows), np.float32)
        self.scales = self.scales * np.float32(factor)
        self.file = open(path, "rb", buffering=0) if hasattr(os, "preadv") else None

    def __call__(self, ids: Sequence[int], out: np.ndarray) -> None:
        """Writes embeddings of `ids` to `out` [tokens, hidden]."""
        row = np.empty(self.rows.shape[1], self.rows.dtype)
        for token, state in zip(ids, out, strict=True):
            if self.file is None:
                row = self.rows[token]
            else:
                os.preadv(self.file.fileno(), [row], self.rows.offset + int(token) * row.nbytes)
            np.multiply(row, self.scales[token], out=state)


class Runtime:
    """The weights of an exported folder, and generation from them. Made by `Runtime.load`.

    Attributes:
        manifest: what the folder says of itself.
        graphs: onnxruntime sessions by name; see `Graphs`.
        arrays: rows of a screen's survivors, and shortlists, by name.
        embed: token ids to embeddings.
        texts: tokenizer, loaded when text is.
    """

    def __init__(self, manifest: dict, graphs: Graphs, arrays: dict, embed: Embedding, texts: Texts):
        self.manifest, self.graphs, self.arrays, self.embed, self.texts = manifest, graphs, arrays, embed, texts
        self.depths = tuple(exit["depth"] for exit in manifest["exits"])
        self._tables: tuple | None = None
        self._growing = threading.Lock()

    @classmethod
    def load(cls, folder: str | Path, threads: int | None = None) -> Runtime:
        """Returns the runtime of a folder.

        Args:
            folder: written by `python -m adaptive.export`.
            threads: that multiply matrices; the cores this process may use if None. The first
                runtime with more than one makes a pool for the process, which all later ones share, whatever they
                ask for, and other onnxruntime sessions made later must, too (`use_per_session_threads = False`).

        Raises:
            ValueError: a file that is missing or was changed, foreign code beside them, another format.
        """
        folder, threads = Path(folder).resolve(), threads or _cores()
        manifest = unseal(folder)
        texts = Texts(folder / "tokenizer.json", manifest["files"]["tokenizer.json"], Chat(manifest["chat"]))
        graphs = Graphs(folder, manifest["files"], _options(threads))
        with loading(folder):
            for name in ("vocabulary", *(f"segment_{index}" for index in range(len(manifest["segments"])))):
                graphs.make(name)
        arrays = {name[:-4]: np.asarray(np.load(folder / name, mmap_mode="r", allow_pickle=False))
                  for name in manifest["files"] if name.endswith(".npy")}  # fmt: skip
        embedding = Embedding(folder, manifest["embedding_factor"])
        return cls(manifest, graphs, arrays, embedding, texts)

    def policy(self, policy: str | ExitPolicy | Sequence[float] = "certified") -> ExitPolicy:
        """Returns a policy by name.

        Args:
            policy: "certified" (the certificate's; full depth if there is none), "full", "budget=0.8" (about that share
                of the full depth's FLOPs on prompts like those surveyed, at the least harm that the survey promises;
                not certified), thresholds, or a policy.

        Raises:
            ValueError: another name, thresholds that do not fit the exits, a budget that no exit keeps.
        """
        count = len(self.depths)
        if isinstance(policy, str):
            return self._named(policy)
        policy = policy if hasattr(policy, "leaves") else ExitPolicy(tuple(policy))
        if len(policy.thresholds) != count:
            raise ValueError(
                f"the policy has {len(policy.thresholds)} thresholds, the model {count} exits (depths "
                f"{list(self.depths)}); give one per exit"
            )
        return policy

    def _named(self, name: str) -> ExitPolicy:
        certificate = self.manifest["certificate"]
        if name == "full" or name == "certified" and certificate is None:
            return ExitPolicy.full(len(self.depths))
        if name == "certified":
            return ExitPolicy(tuple(certificate["thresholds"]))
        kind, _, value = name.partition("=")
        try:
            budget = float(value)
        except ValueError:
            budget = -1.0
        if kind != "budget" or budget <= 0:
            raise ValueError(f"`policy`={name!r} is not one of full, certified, budget=SHARE with a SHARE such as 0.8")
        points = [point for point in self.manifest["frontier"] if point["cost"] <= budget]
        if not points:
            least = min((point["cost"] for point in self.manifest["frontier"]), default=None)
            raise ValueError(
                f"`policy`={name!r}: "
                + ("this folder was exported without a survey; export it with --prompts" if least is None
                   else f"the exits need at least {least:.3f} of the full depth's FLOPs; give a larger share")
            )  # fmt: skip
        return ExitPolicy(tuple(min(points, key=lambda point: point["harm"])["thresholds"]))

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 128,
        policy: str | ExitPolicy | Sequence[float] = "certified",
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[Token]:
        """Returns an iterator of tokens, up to the end of the answer (which is left out) or `max_new_tokens`.

        Args:
            prompt: text to continue, or token ids.
            max_new_tokens: most tokens of the answer.
            policy: see `policy`. The certificate holds for greedy answers (temperature 0) only.
            temperature: of sampling; 0 takes the likeliest token.
            top_p: samples from the likeliest tokens that hold this share of the probability.
            seed: of sampling; None draws one.

        Raises:
            ValueError: an empty or undecodable prompt, unknown ids, more tokens than the model's context, a setting
                that is not allowed.
        """
        ids = self.texts.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        return self._generate(ids, max_new_tokens, policy, temperature, top_p, seed)

    def chat(self, messages: Sequence[dict[str, str]], **settings) -> Iterator[Token]:
        """Returns an iterator over the answer to chat messages ({"role": ..., "content": ...}); see `generate`."""
        return self._generate(self.texts.chat(messages), **settings)

    def _generate(self, ids, max_new_tokens=128, policy="certified", temperature=0.0, top_p=1.0, seed=None):
        policy = self.policy(policy)  # before the first token is asked for: mistakes show at the call
        problems, limit, vocab = [], self.manifest["max_context"], self.manifest["vocab"]
        if not ids:
            problems.append("the prompt is empty; give at least one token")
        if strange := [token for token in ids if not 0 <= token < vocab]:
            problems.append(f"ids {strange[:5]} are outside the vocabulary of {vocab}")
        if max_new_tokens < 1:
            problems.append(f"max_new_tokens={max_new_tokens}; it must be at least 1")
        if limit is not None and len(ids) + max_new_tokens > limit:
            problems.append(
                f"{len(ids)} prompt tokens and {max_new_tokens} new ones do not fit the context of {limit}; shorten "
                "the prompt or lower max_new_tokens"
            )
        if not 0 <= temperature < np.inf or not 0 < top_p <= 1:
            problems.append(f"temperature={temperature} must be 0 or more, top_p={top_p} above 0 and at most 1")
        if problems:
            raise ValueError("generate: " + "; ".join(problems))
        return self._tokens(ids, max_new_tokens, policy, temperature, top_p, seed)

    def _tokens(self, ids, max_new_tokens, policy, temperature, top_p, seed) -> Iterator[Token]:
        generator = np.random.default_rng(seed) if temperature else None  # numpy loads it when it is asked for
        for index, exit in enumerate(self.manifest["exits"]):
            if policy.asks(index):  # now, rather than in the middle of the answer
                for name in {exit["features"], exit["vocabulary"], exit["fill"]} - {None}:
                    self.graphs[name]
        session, text = Session(self, len(ids) + max_new_tokens), self.texts.stream()
        session.prefill(ids, keep=False)
        token = None
        for _ in range(max_new_tokens):
            step = session.step(policy, token)
            token = step.pick(temperature, top_p, generator)
            if token in self.manifest["eos"]:
                return
            depth = (*self.depths, self.manifest["layers"])[step.taken]
            yield Token(token, text(token), depth, step.score, step)

    def trace(self, tokens: Sequence[Token], prompt_tokens: int) -> Trace:
        """Returns the trace of one answer, for `costs.Costs.price`."""
        steps = [token.step for token in tokens]
        return Trace(
            exits=self.depths,
            layers=self.manifest["layers"],
            taken=np.array([[step.taken for step in steps]], np.int16),
            scores=np.array([[step.scores for step in steps]], np.float32),
            context=np.array([[step.context for step in steps]]),
            headed=np.array([[step.headed for step in steps]], bool),
            caught_up=np.array([[step.caught_up for step in steps]], np.int32),
            prompt=np.array([prompt_tokens]),
        )

    def logits(self, states: np.ndarray) -> np.ndarray:
        """Returns full-depth logits [tokens, vocabulary] of states [tokens, hidden] that `Session.prefill` gave."""
        return self.graphs["vocabulary"].run(["logits"], {"normed": states[None]})[0][0]

    def tables(self, room: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns rotary cos and sin [kinds * positions + 1, turned / 2], kind after kind, for at least `room`
        positions each; the last row turns nothing."""
        with self._growing:
            kinds = self.manifest["ropes"]
            if self._tables is None or (len(self._tables[0]) - 1) // len(kinds) < room:
                positions = np.arange(1 << max(room - 1, 255).bit_length(), dtype=np.float32)
                angles = [positions[:, None] * np.float32(kind["inverse"]) for kind in kinds]
                still = np.zeros((1, angles[0].shape[1]), np.float32)
                self._tables = tuple(
                    np.concatenate([*(turn(angle) * np.float32(kind["factor"]) for angle, kind in zip(angles, kinds)),
                                    turn(still)])
                    for turn in (np.cos, np.sin)
                )  # fmt: skip
            return self._tables


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _options(threads: int) -> onnxruntime.SessionOptions:
    """Returns session options. Graphs that run one after the other are a fifth faster on one pool of threads than on a
    pool each, and onnxruntime's one pool is the whole process's."""
    global _pool
    # Its tiles for attention take a third longer over pieces of a prompt as short as a session's.
    os.environ.setdefault("ORT_GQA_DISABLE_FLASH_ATTENTION", "1")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False  # no slower, and 35 MB less for a prompt of 512 tokens
    with _POOL:
        if threads > 1 and _pool is None:
            onnxruntime.set_global_thread_pool_sizes(threads, 1)
            _pool = threads
    options.use_per_session_threads = _pool is None
    if _pool is None:
        options.intra_op_num_threads = options.inter_op_num_threads = 1
    return options
