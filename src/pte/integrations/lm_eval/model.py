"""`--model pte`: a bounded policy as a model of lm-evaluation-harness.

Decides: how the harness's requests become prompts and completions under the budget: the context is the prompt, which is
never evicted and never cut; what follows it is generated or scored by the bounded policy, at temperature 1 where it is
scored. One process; `--batch_size` is the number of slots. What the policy cannot do is refused by name.
Does not know: tasks, how arguments are read (`arguments`), how completions are made (`generation`).
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch
from lm_eval.api.model import TemplateLM
from tqdm import tqdm

from pte.integrations.lm_eval.arguments import experiment_of, sampling_of
from pte.integrations.lm_eval.generation import Wanted, complete
from pte.model.load import check_positions
from pte.rollout.likelihood import likelihood
from pte.rollout.record import collate
from pte.rollout.sampling import stream_seed
from pte.session import open_session
from pte.tasks.task import Task, jsonl_task

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

    from pte.config import ExperimentConfig
    from pte.config_rules import FieldValue


class BoundedLM(TemplateLM):
    """A base with or without an adapter, under a budget.

    Args:
        batch_size: Slots, where it is above 1; the harness's default of 1 and `auto` leave them to the arguments.
        max_batch_size: Refused: nothing is tried out, slots are allocated once.
        arguments: Model arguments: `pretrained`, `adapter`, `window_tokens`, ... (`arguments.experiment_of`).

    Raises:
        ValueError, TypeError, OSError: An argument is unknown, breaks a rule, or names what is not there.
    """

    def __init__(
        self,
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **arguments: FieldValue,
    ) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"--model pte runs in one process, got WORLD_SIZE={os.environ['WORLD_SIZE']}; start it without a "
                f"launcher, with more slots"
            )
        if max_batch_size is not None:
            raise ValueError(
                f"max_batch_size is not offered, got {max_batch_size}; set batch_size, the number of slots"
            )
        if batch_size not in (None, 1, "1") and not str(batch_size).startswith("auto"):
            slots = int(batch_size)  # type: ignore[arg-type]
            if arguments.get("slots", slots) != slots:
                raise ValueError(
                    f"batch_size is the number of slots and must agree with it, got {slots} and "
                    f"{arguments['slots']}; give one of the two"
                )
            arguments["slots"] = slots
        self.config = experiment_of(arguments)
        if self.config.model.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(
                f"device must be there, got {self.config.model.device!r}, and torch sees none: a GPU is the "
                f"harness's default; use --device cpu"
            )
        self.session = open_session(self.config, task_of=without_problems)
        self.tokenizer: PreTrainedTokenizerBase = self.session.task.tokenizer  # type: ignore[assignment]
        self._device = self.session.policy.device
        self.chats: list[str] = []

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.session.task.stop_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the token that begins texts, or the one that ends them."""
        begin = self.tokenizer.bos_token_id
        return begin if isinstance(begin, int) else self.eot_token_id

    @property
    def max_length(self) -> int:
        """Positions that the base was trained on."""
        return int(self.session.policy.base.config.max_position_embeddings)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's cache of requests."""
        return self.config.model.path.replace("/", "__")

    def get_model_info(self) -> dict[str, object]:
        """What the harness writes beside the scores: our version and the resolved experiment."""
        return {"pte_version": version("pte"), "pte_experiment": asdict(self.config)}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, with the template's special tokens written out.

        Raises:
            ValueError: The tokenizer has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"--apply_chat_template needs a chat template in the tokenizer of {self.config.model.path!r}, got "
                f"none; leave it out"
            )
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        assert isinstance(text, str)
        self.note_chat(text.rstrip())
        return text

    def note_chat(self, text: str) -> None:
        """Notes what the template has written; `chats` stays sorted, and none of them begins with another."""
        if not text or self.is_chat(text):
            return
        place = bisect_left(self.chats, text)
        while place < len(self.chats) and self.chats[place].startswith(text):
            del self.chats[place]
        self.chats.insert(place, text)

    def is_chat(self, string: str) -> bool:
        """True for a text that begins with one that the template has written, but for white space at its end."""
        place = bisect_right(self.chats, string)
        return place > 0 and string.startswith(self.chats[place - 1])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **ignored: object) -> list[int]:
        """Token ids of a text; special tokens are added where it does not bring its own.

        Args:
            string: The text. One of the chat template brings its own, as does one that starts with the begin token.
            add_special_tokens: The caller's word.
            ignored: The harness's further options for other models.

        Raises:
            ValueError: The tokenizer cannot encode it.
        """
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token
            begun = isinstance(begin, str) and bool(begin) and string.startswith(begin)
            add_special_tokens = not (self.is_chat(string) or begun)
        try:
            return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(
                f"a request must be text that the tokenizer of {self.config.model.path!r} can encode, got "
                f"{string[:60]!r} ({error}); choose a task in its vocabulary"
            ) from error

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The completion of every context, up to its first stop string.

        A repeated request is another sample: each has a stream of its own, made from the seed, the document's own `id`
        (its task and number where it has none) and the sample's number, as in `pte eval`.
        """
        samples: Counter[tuple[object, ...]] = Counter()
        wanted = []
        for request in requests:
            context, options = request.args
            key = (request.task_name, request.doc_id, request.idx)
            name = document_name(request)
            seed = stream_seed(self.config.run.seed, "eval", name, samples[key])
            samples[key] += 1
            wanted.append(Wanted(tuple(self.tok_encode(context)), seed, sampling_of(options, self.config)))
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:

            def on_text(place: int, text: str) -> None:
                self.cache_hook.add_partial("generate_until", requests[place].args, text)
                bar.update()

            return complete(self.session, self.config, wanted, on_text=on_text)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-prob of every text behind the begin token, one walk under the budget and never in pieces."""
        texts = [request.args[0] for request in requests]
        encoded = [self.tok_encode(text, add_special_tokens=False) for text in texts]
        scores = self.scores([([self.prefix_token_id], ids) for ids in encoded], disable_tqdm=disable_tqdm)
        for text, (logprob, _) in zip(texts, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), logprob)
        return [logprob for logprob, _ in scores]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **ignored: object,
    ) -> list[tuple[float, bool]]:
        """Log-prob of every continuation, and whether greedy decoding would write it."""
        pairs = [(context, continuation) for _, context, continuation in requests]
        scores = self.scores(pairs, disable_tqdm=disable_tqdm)
        for (texts, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def scores(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        """Log-prob and greediness of continuations of token ids, as many at once as there are slots.

        Raises:
            ValueError: A context is empty, or does not fit the trained positions with its continuation.
        """
        policy, seed = self.session.policy, self.config.run.seed
        places = [place for place, (_, continuation) in enumerate(pairs) if continuation]
        places.sort(key=lambda place: -len(pairs[place][0]) - len(pairs[place][1]))
        for place in places:
            check_positions(
                policy.base.config,
                prompt_tokens=len(pairs[place][0]),
                completion_tokens=len(pairs[place][1]),
                allow_beyond_trained_positions=self.config.model.allow_beyond_trained_positions,
            )
        found = [(0.0, True)] * len(pairs)
        with tqdm(total=len(places), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for start in range(0, len(places), self.config.rollout.slots):
                chunk = places[start : start + self.config.rollout.slots]
                contexts, continuations = zip(*(pairs[place] for place in chunk), strict=True)
                batch = collate(
                    contexts,
                    continuations,
                    stream_seeds=[stream_seed(seed, "score", *pairs[place][0], *pairs[place][1]) for place in chunk],
                    temperature=1.0,
                    device=policy.device,
                )
                said = likelihood(policy, batch)
                greedy = (said.likeliest | ~batch.completion_mask).all(1).tolist()
                for place, logprob, is_greedy in zip(chunk, said.logprobs.sum(1).tolist(), greedy, strict=True):
                    found[place] = (logprob, is_greedy)
                bar.update(len(chunk))
        return found


def document_name(request: Instance) -> str:
    """What names a request's document in its random stream."""
    doc: object = request.doc
    if isinstance(doc, Mapping) and isinstance(doc.get("id"), str):
        return doc["id"]
    return f"{request.task_name}/{request.doc_id}/{request.idx}"


def without_problems(config: ExperimentConfig, tokenizer: object) -> Task:
    """A task that only knows the tokenizer: the harness brings the problems."""
    task = jsonl_task(
        tokenizer,  # type: ignore[arg-type]
        seed=config.run.seed,
        train_path=None,
        eval_paths=(),
        eval_problems=None,
        template="raw",
        boxed_instruction=False,
        reward="math",
        traces_path=None,
    )
    return replace(task, num_training=0)
