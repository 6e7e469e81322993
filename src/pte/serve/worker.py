"""The one thread that owns the engines: sequences go in, pieces of text come out.

Decides: the order of work (orders of the event loop, free rows filled in the order of arrival, a step of every engine
that has work), and which adapter is on the base while prompts are read. A sequence waits here, not in its engine, so
that no more prompts are ever read than there are rows. Everything that happened in a round is handed over at once.
Does not know: HTTP, how many sequences may wait.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Literal

import torch

from pte.model.policy import attach_adapter, detach_adapter
from pte.serve.text import CompletionText, Piece

if TYPE_CHECKING:
    from pte.method.adapter import ThoughtAdapter
    from pte.rollout.generate import RolloutEngine
    from pte.rollout.record import Rollout, RolloutRequest
    from pte.rollout.sequences import NewTokens
    from pte.serve.body import Limits

End = Literal["stop", "length", "cancelled", "failed"]
LOG = logging.getLogger("pte.serve")


@dataclass(eq=False)
class ServedSequence:
    """A completion on its way from an engine to a client.

    Args:
        model: Name of the model.
        request: What the engine completes.
        text: Makes text of its tokens.
        choice: Its place in the answer.
        order: In the engine, once it runs.
    """

    model: str
    request: RolloutRequest
    text: CompletionText
    choice: int
    order: int | None = None


@dataclass(frozen=True)
class Progress:
    """News of a sequence.

    Args:
        piece: What may be shown next.
        end: Why nothing follows; None while it runs.
    """

    piece: Piece
    end: End | None


NOTHING = Piece("", ())
News = Sequence[tuple[ServedSequence, Progress]]


@dataclass
class Lane:
    """The work of one model.

    Args:
        engine: Open; its rows are the model's slots.
        waiting: Sequences without a row, the oldest first.
        running: Sequences by their order in the engine.
    """

    engine: RolloutEngine
    waiting: deque[ServedSequence] = field(default_factory=deque)
    running: dict[int, ServedSequence] = field(default_factory=dict)


def rank_of(lane: Lane) -> int:
    """The rank of a lane's adapter; 0 for the base alone."""
    adapter = lane.engine.policy.adapter
    return 0 if adapter is None else adapter.rank


class Worker:
    """Runs the engines of all models in a thread of its own.

    Args:
        engines: By the name of the model, all on one base.
        limits: Slots of each, longest prompt, recorded log-probs.
        publish: Called in the worker's thread with what happened in a round.
        on_failure: Called in the worker's thread when an engine has failed; nothing runs any more.
    """

    def __init__(
        self,
        engines: Mapping[str, RolloutEngine],
        *,
        limits: Limits,
        publish: Callable[[News], None],
        on_failure: Callable[[], None],
    ) -> None:
        self.lanes = {name: Lane(engine) for name, engine in engines.items()}
        self.publish = publish
        self.on_failure = on_failure
        self.news: list[tuple[ServedSequence, Progress]] = []
        self.orders: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.stopping = False
        self.attached: ThoughtAdapter | None = None
        # The base's weights lie beside room for the largest adapter's B: made for it first, they serve all others.
        for lane in sorted(self.lanes.values(), key=rank_of, reverse=True):
            lane.engine.open(
                rows=limits.slots,
                prompt_slots=limits.max_prompt_tokens,
                on_finish=partial(self.finish, lane),
                on_tokens=partial(self.take_tokens, lane),
                top_logprobs=min(limits.top_logprobs, lane.engine.policy.base.config.vocab_size),
                own_temperatures=True,
            )
        # A thread starts with torch's own number of threads, not with the one that its maker chose.
        self.torch_threads = torch.get_num_threads()
        self.thread = threading.Thread(target=self.run, name="pte-engines", daemon=True)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(lane.engine.buffers.cache.kv_bytes for lane in self.lanes.values())

    @property
    def sequences(self) -> int:
        """Sequences that run or wait."""
        return sum(len(lane.waiting) + len(lane.running) for lane in self.lanes.values())

    def start(self) -> None:
        """Begins to work."""
        self.thread.start()

    def stop(self) -> None:
        """Ends the thread; sequences that still run are dropped."""
        self.orders.put(self.end)
        self.thread.join()

    def submit(self, sequences: Sequence[ServedSequence]) -> None:
        """Takes sequences in, from any thread."""
        self.orders.put(partial(self.accept, sequences))

    def cancel(self, sequence: ServedSequence) -> None:
        """Drops a sequence, from any thread; one that has ended is left alone."""
        self.orders.put(partial(self.drop, sequence))

    def run(self) -> None:
        """Works until it is stopped."""
        torch.set_num_threads(self.torch_threads)
        try:
            while not self.stopping:
                self.obey()
                for lane in self.lanes.values():
                    self.advance(lane)
                self.hand_over()
        except Exception:
            LOG.exception("an engine failed; the server ends")
            self.fail()
            self.on_failure()
        finally:
            if self.attached is not None:
                detach_adapter(next(iter(self.lanes.values())).engine.policy.base)

    def obey(self) -> None:
        """Carries out the orders that have come; waits for one where there is nothing else to do."""
        if not self.sequences:
            self.orders.get()()
        while not self.orders.empty():
            self.orders.get()()

    def advance(self, lane: Lane) -> None:
        """Fills free rows, then a step of all that run."""
        engine = lane.engine
        if lane.waiting and engine.free_rows:
            self.attach(engine.policy.adapter)
            while lane.waiting and engine.free_rows:
                sequence = lane.waiting.popleft()
                sequence.order = engine.submit(sequence.request)
                lane.running[sequence.order] = sequence
            engine.refill()
        if engine.busy:
            engine.step()

    def attach(self, adapter: ThoughtAdapter | None) -> None:
        """Puts an adapter on the base, since prompts are read through its modules; without one, any may stay."""
        if adapter is None or adapter is self.attached:
            return
        base = next(iter(self.lanes.values())).engine.policy.base
        if self.attached is not None:
            detach_adapter(base)
        attach_adapter(base, adapter)
        self.attached = adapter

    def hand_over(self) -> None:
        """Publishes what has happened."""
        if self.news:
            news, self.news = self.news, []
            self.publish(news)

    def accept(self, sequences: Sequence[ServedSequence]) -> None:
        """Lets sequences wait for a row."""
        for sequence in sequences:
            self.lanes[sequence.model].waiting.append(sequence)

    def drop(self, sequence: ServedSequence) -> None:
        """Frees the place of a sequence, unless it has ended."""
        lane = self.lanes[sequence.model]
        if sequence in lane.waiting:
            lane.waiting.remove(sequence)
        elif sequence.order in lane.running:
            lane.engine.cancel(sequence.order)
            del lane.running[sequence.order]
        else:
            return
        self.news.append((sequence, Progress(NOTHING, "cancelled")))

    def end(self) -> None:
        """Leaves the thread's loop."""
        self.stopping = True

    def fail(self) -> None:
        """Tells everybody that nothing more will come."""
        for lane in self.lanes.values():
            self.news += [(one, Progress(NOTHING, "failed")) for one in (*lane.running.values(), *lane.waiting)]
            lane.running.clear()
            lane.waiting.clear()
        self.hand_over()

    def take_tokens(self, lane: Lane, new: NewTokens) -> None:
        """Makes text of new tokens; a stop string ends their sequence at once."""
        sequence = lane.running[new.order]
        piece = sequence.text.push(new)
        if sequence.text.stopped:
            lane.engine.cancel(new.order)
            del lane.running[new.order]
            self.news.append((sequence, Progress(piece, "stop")))
        elif piece.text or piece.tokens:
            self.news.append((sequence, Progress(piece, None)))

    def finish(self, lane: Lane, order: int, rollout: Rollout) -> None:
        """Ends a sequence whose completion is whole."""
        sequence = lane.running.pop(order)
        piece = sequence.text.finish()
        end: End = "stop" if sequence.text.stopped else rollout.finish_reason
        self.news.append((sequence, Progress(piece, end)))
