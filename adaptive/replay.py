"""Steps of decoding as CUDA graphs: one for each segment of the chain, and one for what an exit says and leaves behind.

On a GPU a step of a small model is a thousand kernels that take less time to run than to launch. A graph launches its
kernels at once, but always the same ones: so every row runs through every segment that any row needs, and who has left
is written over, logits and K/V, by what his exit makes of him. A segment that nobody needs is not launched. Nothing
is read back but what each gate says. As in transformers, `cache_implementation="static"` asks for this; without it, on
other devices, and for what `fits` refuses, `walk.py` runs kernels one by one. Both give the same but for the order of
summation.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import contextmanager, suppress
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from adaptive.placed import Placed, Unfit
from adaptive.walk import Walk

SMALLEST = 256  # columns; twice as many whenever these are used up
KEPT = 4  # sets of graphs of a model, each with K/V of its own, that are kept for the next generation
DEVICES = ("cuda",)

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


class Graphs:
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
        out: logits [batch, vocabulary] float32.
        key: what must not have changed for this to be used again.
    """

    def __init__(self, walk: Walk, capacity: int):
        batch = len(walk.tokens.ids)
        self.key, self.capacity, self.walk = key(walk), capacity, walk
        self.placed = Placed(walk.backbone, batch, capacity)
        self.asked = [index for index, is_asked in enumerate(walk.asked) if is_asked]
        self.scores = [torch.zeros(batch, device=walk.device) for _ in self.asked]
        self.left = [torch.ones(batch, dtype=torch.bool, device=walk.device) for _ in self.asked]
        self.shown = [np.ones(batch, bool) for _ in self.asked]  # what `left` holds
        self.out = torch.zeros(batch, walk.backbone.vocab_size, device=walk.device)
        self.states: list[Tensor] = []
        self.calls: list = []
        pool = torch.cuda.graph_pool_handle() if walk.device.type == "cuda" else None
        places = range(len(self.asked))
        self.segments = [captured(lambda place=place: self._segment(place), pool, walk.device) for place in places]
        self.segments.append(captured(self._last, pool, walk.device))
        self.leave = [captured(lambda place=place: self._leave(place), pool, walk.device) for place in places]
        if pool is not None:
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
        logits, ids = walk.exits.logits(walk.backbone, index, walk.exits.heads[index](self.states[place])[:, 0])
        self.out.copy_(torch.where(who[:, None], walk.spread(logits.float(), ids), self.out))
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


def captured(work: Callable[[], None], pool, device: torch.device) -> Callable[[], None]:
    """Returns what does `work` again, on the same memory; on a CPU the work itself."""
    if device.type != "cuda":
        work()
        return work
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        work()  # libraries make their workspaces at the first call
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with _capturing, torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # other threads may go on
        work()
    return graph.replay


def key(walk: Walk) -> tuple:
    """Returns what changes when graphs would compute something else: exits asked, the batch, and every weight."""
    weights = (*walk.backbone.model.parameters(), *walk.exits.parameters(), *walk.exits.buffers())
    return len(walk.tokens.ids), tuple(walk.asked), tuple((each.data_ptr(), each._version) for each in weights)


class Replay:
    """A walk whose steps are replayed; used as a `Walk` is.

    Args:
        walk: one that `fits`; its prompt is not run yet.
    """

    def __init__(self, walk: Walk):
        self.walk, self.tokens, self.record = walk, walk.tokens, walk.record
        self.graphs = self._take(SMALLEST)

    def prefill(self) -> Tensor:
        """Runs the prompt as the walk does; returns logits [batch, vocabulary] of the first new token."""
        logits = self.walk.prefill()
        self.graphs.placed.column.fill_(self.tokens.length - 1)
        self.graphs.placed.padding.copy_(torch.from_numpy(self.tokens.padding))
        return logits

    def step(self, live: np.ndarray) -> Tensor:
        """Runs the newest tokens; returns logits [batch, vocabulary], which mean nothing in rows that have ended.

        Args:
            live: rows of the batch; those left out have ended for good.
        """
        if self.tokens.length > self.graphs.capacity:
            self._grow()
        walk, graphs, rows, leaving = self.walk, self.graphs, live, []
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
                leaving.append((place, out))
                rows = rows[~np.isin(rows, out)]
            if not len(rows):
                break
            graphs.segments[place + 1]()
        now["taken"][rows] = len(walk.depths)
        for place, out in leaving:  # last, as the segments have run those who left along
            graphs.let_out(place, out)
        self.record.close(live)
        return graphs.out.clone()

    def close(self) -> None:
        """Keeps the graphs for the next generation."""
        with _lock:
            kept = _kept.setdefault(self.walk.exits, [])
            kept.append(self.graphs)
            del kept[:-KEPT]

    def _take(self, capacity: int) -> Graphs:
        """Returns graphs with room for all tokens so far, kept ones if there are any, and puts the walk's K/V there."""
        while capacity < self.tokens.length + 1:
            capacity *= 2
        wanted, graphs = key(self.walk), None
        with _lock:
            kept = _kept.get(self.walk.exits, [])
            kept[:] = [each for each in kept if each.key[2] == wanted[2]]
            fitting = [each for each in kept if each.key == wanted and each.capacity == capacity]
            if fitting:
                graphs = fitting[-1]
                kept.remove(graphs)
        graphs, cache = graphs or Graphs(self.walk, capacity), self.walk.kv
        graphs.placed.buffer.zero_()  # masked columns are multiplied by 0, which what is no number survives
        cache.capacity = capacity
        cache.keys, cache.values = (list(graphs.placed.buffer[:, part]) for part in (0, 1))
        return graphs

    def _grow(self) -> None:
        old = self.graphs
        self.graphs = self._take(2 * old.capacity)
        here, there = self.graphs.placed, old.placed
        here.buffer[..., : old.capacity, :].copy_(there.buffer)
        here.column.copy_(there.column)
        here.padding.copy_(there.padding)


@contextmanager
def steps(walk: Walk, static: bool):
    """Gives what takes the steps of a generation: a `Replay` where one is wanted and fits, or the walk itself."""
    replay = None
    if static and fits(walk):
        with suppress(Unfit):
            replay = Replay(walk)
    yield replay or walk
    if replay is not None:  # after an error they are forgotten
        replay.close()
