"""One generation over a runtime's graphs: its keys and values, and the walk of each token down the segments."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from onnxruntime import OrtValue

from adaptive.memory import forget, give_back
from adaptive.policy import Progress

SAMPLED = 16  # one score of so many says where the highest ones begin
AT_ONCE = 128  # rows of the vocabulary: a CPU's cache holds them
CHUNK = 128  # prompt tokens run at once; more of them need more memory, and are hardly faster
MANY = 256  # tokens of a prompt from which on graphs of their own, which take a moment to load, are faster


@dataclass
class Step:
    """What happened to one token.

    Attributes:
        logits: [entries], of the head that it left by; the next step overwrites them.
        ids: vocabulary entries of these, or None for the whole vocabulary.
        taken: index of the exit; the number of exits for full depth.
        scores: what each gate said, NaN where it was not asked.
        headed: whether each exit's head was evaluated.
        caught_up: states that each block head ran to fill its own K/V.
        context: tokens attended to, its own included.
        said: what each exit would have said, when probing.
    """

    logits: np.ndarray | None
    ids: np.ndarray | None
    taken: int
    scores: list[float]
    headed: list[bool]
    caught_up: list[int]
    context: int
    said: list[int]

    @property
    def score(self) -> float:
        """What the last gate that was asked said; NaN if none was."""
        asked = [score for score in self.scores if not math.isnan(score)]
        return asked[-1] if asked else math.nan

    def pick(self, temperature: float = 0.0, top_p: float = 1.0, generator: np.random.Generator | None = None) -> int:
        """Returns the likeliest token, or a sampled one (nucleus sampling: Holtzman et al. 2020, section 3.1)."""
        if temperature == 0:
            return best(self.logits, self.ids)
        order = np.argsort(-self.logits, kind="stable") if top_p < 1 else np.arange(len(self.logits))
        below = self.logits[order].astype(np.float64) - self.logits.max()
        with np.errstate(over="ignore"):  # -inf, the highest one's 0 excepted, is what a tiny temperature means
            mass = np.exp(below / temperature).cumsum()
        if top_p < 1:
            mass = mass[: int(np.searchsorted(mass, top_p * mass[-1])) + 1]
        drawn = int(order[np.searchsorted(mass, generator.random() * mass[-1], side="right")])
        return drawn if self.ids is None else int(self.ids[drawn])


def highest(scores: np.ndarray, count: int) -> np.ndarray:
    """Returns the indices of the `count` highest scores [entries], in no order.

    A sample tells from where on scores are worth looking at: several times faster than selecting among all of them.
    """
    sample = scores[::SAMPLED]
    wanted = 2 * count // SAMPLED + 1
    if wanted < len(sample):
        few = np.flatnonzero(scores >= np.partition(sample, -wanted)[-wanted])
        if len(few) >= count:
            return few[np.argpartition(scores[few], -count)[-count:]]
    return np.argpartition(scores, -count)[-count:]


def best(logits: np.ndarray, ids: np.ndarray | None) -> int:
    """Returns the vocabulary entry of the highest of the logits [entries]; the lowest id wins a tie, as ids ascend."""
    place = int(logits.argmax())
    return place if ids is None else int(ids[place])


class Session:
    """Keys, values and states of one generation.

    Args:
        runtime: the weights.
        room: most tokens, prompt and answer together.
    """

    def __init__(self, runtime, room: int):
        self.runtime, self.manifest, self.room = runtime, runtime.manifest, room
        self.exits, self.depths, self.length = self.manifest["exits"], runtime.depths, 0
        shape = self.manifest["shape"]
        dims = (self.manifest["slots"], shape["kv_heads"], room, shape["head_dim"])
        self.kv = np.zeros((2, *dims), np.float32)
        self.keys, self.values = self.kv
        self.last, self.total = np.zeros(1, np.int32), np.zeros(1, np.int32)
        self.shared = {"last": _value(self.last), "total": _value(self.total)}
        kinds = len(self.manifest["ropes"])
        for name, table in zip(("cos", "sin"), runtime.tables(room), strict=True):
            self.shared[name] = _value(table)
            for kind, part in enumerate(np.split(table[:-1], kinds)):
                self.shared[f"{name}_{kind}"] = _value(part)
        # Where each block's rotary table begins; and, per exit, the rows that turn what it fills, keys and then values.
        self.begin = np.array(self.manifest["rope_of"]) * ((len(table) - 1) // kinds)
        self.rows = [np.full((1, 2 * (self.manifest["layers"] - depth)), len(table) - 1) for depth in self.depths]
        for slot in range(dims[0]):
            for name, buffer in (("key", self.keys), ("value", self.values)):
                self.shared[f"past_{name}_{slot}"] = self.shared[f"{name}_{slot}"] = _value(buffer[slot][None])
        hidden = shape["hidden"]
        # The newest token's state at depth 0 and behind every segment.
        self.states = [np.zeros((1, 1, hidden), np.float32) for _ in range(len(self.manifest["segments"]) + 1)]
        self.bound: dict[str, tuple] = {}
        for index in range(len(self.manifest["segments"])):
            self._bind(f"segment_{index}", state=self.states[index], out=self.states[index + 1])
        self.kept = {index: np.zeros((room, hidden), np.float32)
                     for index, exit in enumerate(self.exits) if exit["slot"] is not None}  # fmt: skip
        self.frontier = dict.fromkeys(self.kept, 0)
        self.progress = Progress((*self.depths, self.manifest["layers"]), np.zeros(1, int), np.zeros(1, int))

    def prefill(self, ids, keep: bool = True) -> np.ndarray | None:
        """Runs tokens at full depth; returns their final states [tokens, hidden], behind the final norm, to `keep`.

        A long prompt that is only to be gone on from is read in whole numbers, if the folder has its weights in them.
        """
        if self.length + len(ids) > self.room:
            raise ValueError(f"{len(ids)} more tokens do not fit: the session has room for {self.room}")
        many = not keep and len(ids) >= MANY and "prompt_0.onnx" in self.manifest["files"]
        out, kind = [], "prompt" if many else "segment"
        again = many and "prompt_0" in self.runtime.graphs
        for start in range(0, len(ids), CHUNK):
            piece = ids[start : start + CHUNK]
            self._place(self.length + len(piece))
            state, found = np.empty((1, len(piece), self.states[0].shape[-1]), np.float32), {}
            self.runtime.embed(piece, state[0])
            self.states[0][:] = state[:, -1:]
            for index in range(len(self.manifest["segments"])):
                found = self._run_many(f"{kind}_{index}", state)
                for name, newest in self.bound[f"segment_{index}"][3].items():
                    newest[:] = found[name][:, -1:]
                state = found["out"]
                for exit in self.kept:
                    if self.exits[exit]["segment"] == index:
                        self.kept[exit][self.length : self.length + len(piece)] = state[0]
            self.length += len(piece)
            if keep:
                out.append(found["normed"][0])
            del state, found
        if len(ids) > CHUNK and not again:  # once, where speed counts: it takes a sixth of a prompt to find again
            forget(self.runtime.graphs.folder)
        give_back()
        return np.concatenate(out) if keep else None

    def step(self, policy, token: int | None = None, probe: bool = False) -> Step:
        """Returns what becomes of the newest token.

        Args:
            policy: who leaves where.
            token: to run; None for the prompt's last one, which `prefill` has run already.
            probe: ask every gate and head, and let nobody leave.
        """
        ran = token is None
        if not ran:
            if self.length >= self.room:
                raise ValueError(f"the session is full: it has room for {self.room} tokens")
            self._place(self.length + 1)
            self.runtime.embed([token], self.states[0][0])
            self.length += 1
        count = len(self.exits)
        step = Step(None, None, count, [math.nan] * count, [False] * count, [0] * count, self.length, [])
        done = 0
        for index, exit in enumerate(self.exits):
            if not (probe or policy.asks(index)):
                continue
            if not ran:
                done = self._advance(done, exit["segment"] + 1)
            state = self.states[exit["segment"] + 1]
            if not ran and index in self.kept:
                self.kept[index][self.length - 1] = state[0, 0]
            early = probe or exit["gate"] in ("max_prob", "margin", "entropy")
            found = self._head(index, step) if early else None
            # Of the exit right before, whether or not that was asked.
            before = self.states[self.exits[index - 1]["segment"] + 1 if index else 0]
            step.scores[index] = self._score(index, state[0, 0], before[0, 0], found)
            if probe:
                step.said.append(best(*found))
            elif policy.leaves(index, np.array([step.scores[index]]), self.progress):
                step.logits, step.ids = found or self._head(index, step)
                step.taken = index
                if not ran:
                    self._skip(index, state)
                return self._counted(step)
        if not ran:
            self._advance(done, len(self.manifest["segments"]))
        normed = self.bound[f"segment_{len(self.manifest['segments']) - 1}"][3]["normed"]
        step.logits = self._run("vocabulary", normed=normed)["logits"].reshape(-1)
        return self._counted(step)

    def _counted(self, step: Step) -> Step:
        """Returns the step, noted for policies that look back."""
        self.progress.tokens[0] += 1
        self.progress.blocks[0] += self.progress.depths[step.taken]
        return step

    def _head(self, index: int, step: Step) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns (logits [entries], their ids or None) of one exit's head for the newest token; noted in `step`."""
        exit, step.headed[index] = self.exits[index], True
        if exit["slot"] is not None:
            normed, step.caught_up[index] = self._catch_up(index)
            found = {"normed": normed}
        else:
            state, borrowed = self.states[exit["segment"] + 1], self._borrowed(exit["borrowed"])
            own = self._filling(index, state) if exit["fill"] == exit["features"] else {"state": state}
            found = self._run(exit["features"], own, **borrowed)
        if exit["vocabulary"] is not None:
            normed = found["normed"]
            found = self._run(exit["vocabulary"], normed=normed)
        logits = found["logits"].reshape(-1)
        if exit["entries"] == "picked":
            ids = np.sort(highest(logits, exit["count"]))
            return self._exact(exit["rows"], ids, normed.reshape(-1)), ids
        return logits, self.runtime.arrays[exit["ids"]] if exit["entries"] == "fixed" else None

    def _exact(self, rows: str, ids: np.ndarray, normed: np.ndarray) -> np.ndarray:
        """Returns the LM head's logits of entries `ids` [entries] for one normed state [hidden]."""
        arrays, cap = self.runtime.arrays, self.manifest["softcap"]
        logits, wide = np.empty(len(ids), np.float32), np.empty((AT_ONCE, len(normed)), np.float32)
        for start in range(0, len(ids), AT_ONCE):
            chosen = ids[start : start + AT_ONCE]
            wide[: len(chosen)] = arrays[rows][chosen]
            # Row by row: as one product it would start threads of its own.
            logits[start : start + AT_ONCE] = np.vecdot(wide[: len(chosen)], normed)
        if f"{rows}_scale" in arrays:
            logits *= arrays[f"{rows}_scale"][ids]
        if "head_bias" in arrays:
            logits += arrays["head_bias"][ids]
        return logits if cap is None else np.tanh(logits / np.float32(cap)) * np.float32(cap)

    def _borrowed(self, slots: list[int]) -> dict[str, np.ndarray]:
        """Returns what a block head on the backbone's K/V needs: the newest token's own, and its position."""
        now = self.length - 1
        out = {f"key_now_{slot}": self.keys[slot, :, now].reshape(1, 1, -1) for slot in slots}
        out |= {f"value_now_{slot}": self.values[slot, :, now].reshape(1, 1, -1) for slot in slots}
        return out | {"position": np.array([[now]])} if slots else {}

    def _advance(self, done: int, until: int) -> int:
        """Runs segments done..until-1 for the newest token."""
        for index in range(done, until):
            self._go(f"segment_{index}")
        return until

    def _place(self, end: int) -> None:
        """Tells attention where the tokens that are run next end."""
        self.total[0], self.last[0] = end, end - 1

    def _skip(self, index: int, state: np.ndarray) -> None:
        """Fills what lies beyond the exit from the state that the token left with: K/V and deeper heads' states."""
        exit, depth, layers, now = self.exits[index], self.depths[index], self.manifest["layers"], self.length - 1
        if exit["fill"] is not None:  # its head may have made them already
            if exit["fill"] != exit["features"]:
                self._run(exit["fill"], self._filling(index, state))
            filled = self.bound[exit["fill"]][3]["filled"].reshape(2, layers - depth, -1, self.keys.shape[-1])
            self.kv[:, depth:layers, :, now] = filled
        for deeper in self.kept:
            if deeper > index:
                self.kept[deeper][now] = state[0, 0]

    def _filling(self, index: int, state: np.ndarray) -> dict[str, np.ndarray]:
        """Returns what an exit's graph needs to fill K/V: the state, and where the newest token is."""
        rows, begin = self.rows[index], self.begin[self.depths[index] :]
        np.add(begin, self.length - 1, out=rows[0, : len(begin)])
        return {"state": state, "rows": rows}

    def _catch_up(self, index: int) -> tuple[np.ndarray, int]:
        """Runs a block head over every token since it was last asked; returns the newest one's normed state
        [1, 1, hidden] and how many there were."""
        first, self.frontier[index] = self.frontier[index], self.length
        self._place(self.length)
        state = np.ascontiguousarray(self.kept[index][None, first : self.length])
        normed = self._run_many(self.exits[index]["features"], state)["normed"]
        return np.ascontiguousarray(normed[:, -1:]), self.length - first

    def _score(self, index: int, state: np.ndarray, before: np.ndarray, found: tuple | None) -> float:
        """Returns what a gate says, in [0, 1]."""
        kind = self.exits[index]["gate"]
        if kind in ("linear", "mlp"):
            logit = float(self.bound[f"segment_{self.exits[index]['segment']}"][3]["logit"][0, 0, 0])
            return 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0
        if kind == "similarity":
            cosine = float(state @ before) / max(float(np.sqrt((state @ state) * (before @ before))), 1e-8)
            return min(max((1 + cosine) / 2, 0.0), 1.0)
        logits = found[0].astype(np.float64)
        probs = np.exp(logits - logits.max())
        probs /= probs.sum()
        if kind == "entropy":
            value = 1 + float((probs * np.log(np.maximum(probs, 1e-30))).sum()) / math.log(len(probs))
            return min(max(value, 0.0), 1.0)
        second, first = np.partition(probs, -2)[-2:]
        return float(first if kind == "max_prob" else first - second)

    def _bind(self, name: str, **arrays: np.ndarray) -> None:
        """Binds a graph to arrays for one token; what is not given is shared, or made."""
        graph = self.runtime.graphs[name]
        binding, outputs = graph.io_binding(), {}
        for item in graph.get_inputs():
            shared = self.shared.get(item.name)
            binding.bind_ortvalue_input(item.name, _value(arrays[item.name]) if shared is None else shared)
        for item in graph.get_outputs():
            shared = self.shared.get(item.name)
            if shared is None:
                dims = [1 if isinstance(size, str) else size for size in item.shape]
                outputs[item.name] = arrays[item.name] if item.name in arrays else np.zeros(dims, np.float32)
                shared = _value(outputs[item.name])
            binding.bind_ortvalue_output(item.name, shared)
        self.bound[name] = (graph, binding, arrays, outputs)

    def _go(self, name: str) -> dict[str, np.ndarray]:
        graph, binding, _, outputs = self.bound[name]
        graph.run_with_iobinding(binding)
        return outputs

    def _run(self, name: str, own: dict | None = None, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        """Runs a graph for one token. Arrays of its `own` are the same ones every time; others are copied to those that
        are bound."""
        if name not in self.bound:
            self._bind(name, **(own or {}), **{key: np.array(value) for key, value in arrays.items()})
        for key, value in arrays.items():
            self.bound[name][2][key][:] = value
        return self._go(name)

    def _run_many(self, name: str, state: np.ndarray) -> dict[str, np.ndarray]:
        """Runs a graph of blocks for several tokens [1, tokens, hidden]; returns what is not K/V."""
        graph, found = self.runtime.graphs[name], {}
        binding = graph.io_binding()
        for item in graph.get_inputs():
            binding.bind_ortvalue_input(item.name, self.shared.get(item.name) or _value(state))
        for item in graph.get_outputs():
            if item.name not in self.shared:
                found[item.name] = np.empty((*state.shape[:2], item.shape[-1]), np.float32)
            binding.bind_ortvalue_output(item.name, self.shared.get(item.name) or _value(found[item.name]))
        graph.run_with_iobinding(binding)
        return found


def _value(array: np.ndarray) -> OrtValue:
    """Returns an OrtValue over an array's own memory."""
    assert array.flags.c_contiguous, "a copy would be written instead"
    return OrtValue.ortvalue_from_numpy(array, "cpu")
