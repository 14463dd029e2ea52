"""Steps of decoding as CUDA graphs: one for each segment of the chain, and one for what an exit says and leaves behind.

On a GPU a step of a small model is a thousand kernels that take less time to run than to launch. A graph launches its
kernels at once, but always the same ones: so every row runs through every segment that any row needs, and who has left
is written over, logits and K/V, by what his exit makes of him. A segment that nobody needs is not launched. Nothing
is read back but what each gate says. The trace says where rows left, not that they were run along with others.

As in transformers, `cache_implementation="static"` asks for this; without it, on other devices, and for what `fits`
refuses, `walk.py` runs kernels one by one. Both give the same but for the order of summation.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from adaptive.exits import spread
from adaptive.placed import Placed
from adaptive.walk import Walk

SMALLEST = 256  # columns; twice as many whenever these are used up
KEPT = 8  # sets of graphs of a model, each with K/V of its own, that are kept for later generations
DEVICES = ("cuda",)

logger = logging.getLogger(__name__)
_kept: WeakKeyDictionary = WeakKeyDictionary()  # exits -> sets of graphs that nobody uses, the newest last
_lock = threading.Lock()
_capturing = threading.Lock()  # torch captures on one stream


def fits(walk: Walk) -> bool:
    """Returns whether a walk can be replayed."""
    asked = [index for index, is_asked in enumerate(walk.asked) if is_asked]
    return (
        walk.device.type in DEVICES
        and walk.strategy == "propagate"
        and not walk.probe
        and len(walk.members) == len(walk.tokens.ids)  # nobody shares K/V
        and all(walk.exits.gates[index].learned and walk.exits.heads[index].kind != "block" for index in asked)
        and walk.run != walk.backbone.run
        and Placed.fits(walk.backbone)
    )


class Captured:
    """All that a step may launch, for one batch size, one capacity and some exits.

    Args:
        walk: has the blocks, the exits and which of them are asked.
        capacity: columns.

    Attributes:
        placed: inputs and K/V.
        asked: indices of the exits that are asked.
        segments: launch what leads to each of these, its gate's scores included, and to full depth.
        leave: launch what those in `left` say there, and their K/V beyond.
        scores, left: for each, [batch] float32 and bool.
        normed: for each, the states [batch, hidden] that its head has made.
        out: logits [batch, vocabulary] float32.
        key: what must not have changed for this to be used again.
        held: what the graphs read that nobody else may keep.
    """

    def __init__(self, walk: Walk, capacity: int):
        batch, device = len(walk.tokens.ids), walk.device
        self.key, self.capacity, self.walk = key(walk), capacity, walk
        self.placed = Placed(walk.backbone, batch, capacity)
        self.asked = [index for index, is_asked in enumerate(walk.asked) if is_asked]
        self.scores = [torch.zeros(batch, device=device) for _ in self.asked]
        self.left = [torch.ones(batch, dtype=torch.bool, device=device) for _ in self.asked]
        self.shown = [np.ones(batch, bool) for _ in self.asked]  # what `left` holds
        self.out = torch.zeros(batch, walk.backbone.vocab_size, device=device)
        self.states: list[Tensor] = []
        self.normed: dict[int, Tensor] = {}
        self.calls: list = []
        places = range(len(self.asked))
        segments = [partial(self._segment, place) for place in places]
        leave = [partial(self._leave, place) for place in places]
        made = capture([*segments, self._last, *leave], device)
        self.segments, self.leave = made[: len(places) + 1], made[len(places) + 1 :]
        self.held = (walk.backbone.packed, walk.run, dict(walk.exits._rows))
        if device.type == "cuda":
            del self.walk  # and with it the exits, which otherwise would never be forgotten

    def _segment(self, place: int) -> None:
        walk, index = self.walk, self.asked[place]
        del self.states[place:]
        if place == 0:
            state, self.calls = self.placed.begin()
            depth = 0
        else:
            state, depth = self.states[place - 1], walk.depths[self.asked[place - 1]]
        state = walk.run(state, self.calls, depth, walk.depths[index])
        self.states.append(state)
        self.scores[place].copy_(walk.exits.gates[index].score(state[:, 0]))

    def _last(self) -> None:
        walk, depth = self.walk, 0
        if self.asked:
            state, depth = self.states[-1], walk.depths[self.asked[-1]]
        else:
            state, self.calls = self.placed.begin()
        state = walk.run(state, self.calls, depth, walk.backbone.num_layers)
        self.out.copy_(walk.backbone.logits(walk.backbone.norm(state[:, 0])))

    def _leave(self, place: int) -> None:
        walk, index, who = self.walk, self.asked[place], self.left[place]
        self.normed[place] = walk.exits.heads[index](self.states[place])[:, 0]
        logits, ids = walk.exits.logits(walk.backbone, index, self.normed[place])
        self.out.copy_(torch.where(who[:, None], spread(logits.float(), ids, self.out.shape[1]), self.out))
        if walk.depths[index] < walk.backbone.num_layers:
            self.placed.fill(self.states[place], self.calls, walk.depths[index], who, walk.exits.fills[index])

    def let_out(self, place: int, rows: np.ndarray) -> None:
        """Has these rows say what the exit says."""
        who = np.zeros(len(self.out), bool)
        who[rows] = True
        if (who != self.shown[place]).any():
            self.shown[place] = who
            self.left[place].copy_(torch.from_numpy(who))
        self.leave[place]()


def capture(works: list[Callable[[], None]], device: torch.device) -> list[Callable[[], None]]:
    """Returns what does each of these works again, on the same memory; on a CPU the works themselves."""
    if device.type != "cuda":
        for work in works:
            work()
        return works
    graphs = []
    with torch.cuda.device(device), _capturing:
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        for work in works:
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                work()  # libraries make their workspaces at the first call
            torch.cuda.current_stream(device).wait_stream(stream)
            graphs.append(torch.cuda.CUDAGraph())
            # Other threads may go on.
            with torch.cuda.graph(graphs[-1], pool=pool, stream=stream, capture_error_mode="thread_local"):
                work()
    return [graph.replay for graph in graphs]


def key(walk: Walk) -> tuple:
    """Returns what changes when graphs would compute something else: the batch, exits asked, and every weight."""
    weights = (*walk.backbone.model.parameters(), *walk.exits.parameters(), *walk.exits.buffers())
    stamps = tuple((each.data_ptr(), each._version) for each in weights)
    return len(walk.tokens.ids), tuple(walk.asked), (id(walk.backbone.projections), *stamps)


class Replay:
    """A walk whose steps are replayed; used as a `Walk` is.

    Args:
        walk: one that `fits`; its prompt is not run yet.
    """

    def __init__(self, walk: Walk):
        self.walk, self.tokens, self.record = walk, walk.tokens, walk.record
        self.graphs: Captured | None = None
        self.leaving: list[tuple[int, np.ndarray]] | None = None  # place of an exit, and rows; None: the prompt's step

    def prefill(self) -> Tensor:
        """Runs the prompt as the walk does; returns logits [batch, vocabulary] of the first new token."""
        return self.walk.prefill()

    def step(self, live: np.ndarray) -> Tensor:
        """Runs the newest tokens; returns logits [batch, vocabulary], which mean nothing in rows that have ended.

        Args:
            live: rows of the batch; those left out have ended for good.
        """
        if self.graphs is None or self.tokens.length > self.graphs.capacity:
            self._move()
        walk, graphs, rows, self.leaving = self.walk, self.graphs, live, []
        graphs.placed.ids.copy_(self.tokens.ids[:, -1:])
        graphs.segments[0]()
        now = self.record.open()
        for place, index in enumerate(graphs.asked):
            scores = graphs.scores[place].cpu().numpy()
            who = rows[walk.asks[index, rows]]
            now["scores"][who, index] = scores[who]
            out = who[walk.policies.leaves(index, scores[who], who, self.record.progress)]
            if len(out):
                now["taken"][out], now["headed"][out, index] = index, True
                self.leaving.append((place, out))
                rows = rows[~np.isin(rows, out)]
            if not len(rows):
                break
            graphs.segments[place + 1]()
        now["taken"][rows] = len(walk.depths)
        for place, out in self.leaving:  # last, as the segments have run those who left along
            graphs.let_out(place, out)
        self.record.close(live)
        return graphs.out.clone()

    @property
    def listed(self) -> list[tuple[np.ndarray, Tensor]]:
        """As `Walk.listed`."""
        if self.leaving is None:
            return self.walk.listed
        made = self.graphs.normed
        return [(rows, made[place][torch.as_tensor(rows, device=self.walk.device)]) for place, rows in self.leaving]

    def close(self) -> None:
        """Keeps the graphs for later generations."""
        if self.graphs is not None:
            with _lock:
                kept = _kept.setdefault(self.walk.exits, [])
                kept.append(self.graphs)
                del kept[:-KEPT]

    def _take(self) -> Captured:
        """Returns graphs with room for all tokens so far: kept ones if there are any."""
        capacity, wanted = SMALLEST, key(self.walk)
        while capacity < self.tokens.length:
            capacity *= 2
        with _lock:
            kept = _kept.get(self.walk.exits, [])
            kept[:] = [each for each in kept if each.key[2] == wanted[2]]
            for graphs in kept:
                if graphs.key == wanted and graphs.capacity == capacity:
                    kept.remove(graphs)
                    return graphs
        logger.info("making graphs for a batch of %d and %d columns", len(self.tokens.ids), capacity)
        with torch.inference_mode(False), torch.no_grad():  # what they are made of outlasts this generation
            return Captured(self.walk, capacity)

    def _move(self) -> None:
        """Puts all tokens so far into graphs with room for them."""
        end, graphs = self.tokens.length - 1, self._take()
        placed = graphs.placed
        placed.buffer.zero_()  # masked columns are multiplied by 0, which what is no number survives
        graphs.out.zero_()
        if self.graphs is None:
            for parts in zip(placed.buffer, self.walk.kv.keys, self.walk.kv.values, strict=True):
                for there, here in zip(parts[0], parts[1:], strict=True):
                    there[:, :, :end].copy_(here[: len(there), :, :end])
            self.walk.kv.keys, self.walk.kv.values = [], []
        else:
            placed.buffer[..., :end, :].copy_(self.graphs.placed.buffer[..., :end, :])
            self.close()
        placed.column.fill_(end - 1)
        placed.padding.copy_(torch.from_numpy(self.tokens.padding))
        self.graphs = graphs


@contextmanager
def steps(walk: Walk, static: bool):
    """Gives what takes the steps of a generation: a `Replay` where one is wanted and fits, or the walk itself."""
    replay = Replay(walk) if static and fits(walk) else None
    if static and replay is None:
        logger.info("a static cache is asked for, but steps of this kind are not replayed")
    yield replay or walk
    if replay is not None:  # after an error they are forgotten
        replay.close()
