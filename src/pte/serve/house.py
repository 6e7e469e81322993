"""The event loop's side of the work: who is let in, and the news of each call as they come.

Decides: that a model never has more sequences than slots and queue, which is what bounds memory and waiting; a call
beyond is refused at once. A sequence has its place until it has ended and its call has left, so that answers which
nobody reads are no more than the places. Does not know: HTTP, engines.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING

from pte.rollout.record import RolloutRequest
from pte.rollout.sampling import stream_seed
from pte.serve.errors import ApiError
from pte.serve.text import CompletionText
from pte.serve.worker import ServedSequence, Worker

if TYPE_CHECKING:
    from pte.serve.body import CompletionRequest
    from pte.serve.models import ServedModels
    from pte.serve.text import Piece
    from pte.serve.worker import End, News, Progress

RETRY_AFTER_SECONDS = 1


class Call:
    """The completions of one request, as they come.

    Args:
        house: Where they run.
        sequences: By their place in the answer.
    """

    def __init__(self, house: House, sequences: Sequence[ServedSequence]) -> None:
        self.house = house
        self.sequences = sequences
        self.inbox: asyncio.Queue[tuple[int, Progress]] = asyncio.Queue()
        self.open = set(sequences)
        self.has_left = False

    async def progress(self) -> AsyncIterator[tuple[int, Piece, End | None]]:
        """Place in the answer, next piece, and why nothing follows, until all have ended.

        Raises:
            ApiError: The engine has failed.
        """
        left = len(self.sequences)
        while left:
            choice, news = await self.inbox.get()
            if news.end == "failed":
                raise ApiError("the engine has failed and the server ends; see its log", status=500)
            left -= news.end is not None
            yield choice, news.piece, news.end

    def leave(self) -> None:
        """Gives its places back; what still runs is dropped, and its place is free once the worker has seen it."""
        if self.has_left:
            return
        self.has_left = True
        for sequence in self.sequences:
            if sequence in self.open:
                self.house.worker.cancel(sequence)
            else:
                self.house.free_place(sequence)

    @property
    def completion_tokens(self) -> int:
        """Tokens drawn for all completions."""
        return sum(sequence.text.drawn_tokens for sequence in self.sequences)


class House:
    """Lets calls in and hands them the news.

    Args:
        models: What is served; their slots are allocated here.
        on_failure: Called in the event loop when an engine has failed.

    Raises:
        ValueError: A prompt and a completion of full length exceed the trained positions.
    """

    def __init__(self, models: ServedModels, *, on_failure: Callable[[], None]) -> None:
        self.models = models
        self.on_failure = on_failure
        self.present: Counter[str] = Counter()
        self.calls: dict[ServedSequence, Call] = {}
        self.failed = False
        self.loop: asyncio.AbstractEventLoop
        self.worker = Worker(
            models.engines(),
            limits=models.limits,
            publish=lambda news: self.call_soon(self.receive, news),
            on_failure=lambda: self.call_soon(self.fail),
        )

    def start(self) -> None:
        """Begins to work, for the event loop that runs."""
        self.loop = asyncio.get_running_loop()
        self.worker.start()

    def call_soon(self, function: Callable[..., None], *arguments: News) -> None:
        """Lets the event loop call a function, from any thread."""
        self.loop.call_soon_threadsafe(function, *arguments)

    def enter(self, request: CompletionRequest) -> Call:
        """The completions that a request asks for, on their way.

        Raises:
            ApiError: The house is full, or the engine has failed.
        """
        limits = self.models.limits
        room = limits.slots + limits.max_queue - self.present[request.model]
        count = len(request.prompts) * request.samples
        if self.failed:
            raise ApiError("the engine has failed and the server ends; see its log", status=503)
        if count > room:
            raise ApiError(
                f"the model is busy: {limits.slots} sequences run and {limits.max_queue} may wait, and {count} more do "
                f"not fit; try again after a moment",
                status=503,
                code="server_busy",
                headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
            )
        call = Call(self, [self.sequence(request, choice) for choice in range(count)])
        self.present[request.model] += count
        self.calls.update(dict.fromkeys(call.sequences, call))
        self.worker.submit(call.sequences)
        return call

    def sequence(self, request: CompletionRequest, choice: int) -> ServedSequence:
        """One of the completions; its stream is a function of the request's seed and its place in the answer."""
        prompt = request.prompts[choice // request.samples]
        text = CompletionText(
            self.models.tokenizer,
            stops=request.stops,
            stop_token_ids=self.models.stop_token_ids,
            # A chat message is a text of its own; a completion goes on with the prompt's.
            before=prompt if request.kind == "completion" else (),
            top_logprobs=request.top_logprobs,
        )
        wanted = RolloutRequest(
            prompt,
            stream_seed(request.seed, choice),
            max_new_tokens=request.max_new_tokens,
            temperature=request.temperature,
        )
        return ServedSequence(request.model, wanted, text, choice)

    def receive(self, news: News) -> None:
        """Hands news to their calls; who has ended makes room."""
        for sequence, progress in news:
            call = self.calls[sequence]
            if not call.has_left:
                call.inbox.put_nowait((sequence.choice, progress))
            if progress.end is not None:
                del self.calls[sequence]
                call.open.discard(sequence)
                if call.has_left:
                    self.free_place(sequence)

    def free_place(self, sequence: ServedSequence) -> None:
        """Makes room for another, now that a sequence has ended and its call has left."""
        self.present[sequence.model] -= 1

    def fail(self) -> None:
        """Lets nobody in any more."""
        self.failed = True
        self.on_failure()
