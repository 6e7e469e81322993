"""Prompts and messages of a request as token ids.

Decides: which forms of a prompt and of a message are read, that a chat goes through the tokenizer's own template, and
which special tokens are added (a template writes its own). Does not know: the other fields of a request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pte.serve.errors import ApiError
from pte.serve.fields import SHOWN_CHARACTERS, Fields

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "developer", "user", "assistant")


class PromptEncoder:
    """Makes token ids of what a request has as its prompt.

    Args:
        tokenizer: Of the base.
        vocabulary: Token ids of the base are below this.
        max_prompt_tokens: Longest prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, vocabulary: int, max_prompt_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.max_prompt_tokens = max_prompt_tokens
        # No token stands for more than its own text and the space before it.
        self.max_characters = (1 + max(map(len, tokenizer.get_vocab()))) * max_prompt_tokens
        # The first call may set truncation and padding; after it, calls only read, so that threads can share it.
        tokenizer("")

    def prompts(self, prompt: object, *, most: int) -> tuple[tuple[int, ...], ...]:
        """The prompts of a completion call: a string, strings, token ids, or lists of token ids.

        Args:
            prompt: The field's value.
            most: Prompts that there is room for.

        Raises:
            ApiError: It is something else, there are too many, or a prompt is empty, too long or nothing that the
                tokenizer and the model know.
        """
        several: list[object]
        if isinstance(prompt, list) and prompt and all(isinstance(one, str | list) for one in prompt):
            several = prompt
        else:
            several = [prompt]
        if len(several) > most:
            raise ApiError(
                f"prompt must hold at most {most} prompts (slots and queue of this server), got {len(several)}; send "
                f"several requests",
                param="prompt",
            )
        return tuple(self.prompt(one) for one in several)

    def prompt(self, prompt: object) -> tuple[int, ...]:
        """One prompt of a completion call."""
        if isinstance(prompt, str):
            return self.encode(prompt, param="prompt", add_special_tokens=True)
        if isinstance(prompt, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in prompt):
            return self.checked(tuple(prompt), param="prompt")
        raise ApiError(
            f"prompt must be a string, a list of strings, a list of token ids or a list of such lists, got "
            f'{type(prompt).__name__}; send for example "Once"',
            param="prompt",
        )

    def chat(self, messages: object) -> tuple[int, ...]:
        """The conversation as the tokenizer's chat template writes it, and the opening of the answer.

        Raises:
            ApiError: There is no template, a message is malformed, or the whole is too long.
        """
        if not self.tokenizer.chat_template:
            raise ApiError(
                "messages must go through a chat template, and this model's tokenizer has none; use /v1/completions",
                param="messages",
            )
        if not isinstance(messages, list) or not messages:
            raise ApiError(
                "messages must be a list of at least 1 message, got none; send [{'role': 'user', 'content': 'Hello'}]",
                param="messages",
            )
        said = [self.message(one, place=f"messages[{index}]") for index, one in enumerate(messages)]
        try:
            text = self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template raises what it likes
            raise ApiError(
                f"messages must be what the model's chat template takes ({' '.join(str(error).split())[:200]}); "
                f"change their roles or order",
                param="messages",
            ) from error
        assert isinstance(text, str)
        return self.encode(text, param="messages", add_special_tokens=False)

    def message(self, message: object, *, place: str) -> dict[str, str]:
        """One message: who says what."""
        if not isinstance(message, dict):
            raise ApiError(
                f"{place} must be an object, got {type(message).__name__}; send role and content", param=place
            )
        fields = Fields(message, within=place)
        role = fields.text("role")
        if role not in ROLES:
            raise ApiError(
                f"{place}.role must be one of {', '.join(ROLES)}, got {fields.shown('role')}; this server completes "
                f"text",
                param=f"{place}.role",
            )
        content = fields.take("content")
        if isinstance(content, list):
            content = "".join(self.part(one, place=f"{place}.content[{index}]") for index, one in enumerate(content))
        if not isinstance(content, str):
            raise fields.wrong("content", "be a string or a list of text parts", 'send for example "Hello"')
        found = {"role": role, "content": content}
        if fields.has("name"):
            found["name"] = fields.text("name")
        fields.refuse_others(())
        return found

    @staticmethod
    def part(part: object, *, place: str) -> str:
        """The text of one part of a message's content."""
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ApiError(
                f"{place} must be a text part, got another; this server reads text only: send "
                f"{{'type': 'text', 'text': 'Hello'}}",
                param=place,
            )
        text = part["text"]
        assert isinstance(text, str)
        return text

    def encode(self, text: str, *, param: str, add_special_tokens: bool) -> tuple[int, ...]:
        """A text as token ids; one that cannot fit is refused before it costs anything."""
        if len(text) > self.max_characters:
            raise ApiError(
                f"{param} must have at most {self.max_characters} characters ({self.max_prompt_tokens} tokens) on this "
                f"server, got {len(text)}; shorten it",
                param=param,
                code="context_length_exceeded",
            )
        try:
            ids = self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        except Exception as error:  # tokenizers raises nothing narrower
            raise ApiError(
                f"{param} must be text that the model's tokenizer can encode ({' '.join(str(error).split())[:120]}); "
                f"use the words of its vocabulary",
                param=param,
            ) from error
        return self.checked(tuple(ids), param=param)

    def checked(self, ids: tuple[int, ...], *, param: str) -> tuple[int, ...]:
        """The same token ids, if there is room for them and the model knows all of them."""
        if not ids:
            raise ApiError(f"{param} must have at least 1 token, got none; write something", param=param)
        if len(ids) > self.max_prompt_tokens:
            raise ApiError(
                f"{param} must have at most {self.max_prompt_tokens} tokens on this server, got {len(ids)}; shorten it",
                param=param,
                code="context_length_exceeded",
            )
        strange = next((one for one in ids if not 0 <= one < self.vocabulary), None)
        if strange is not None:
            raise ApiError(
                f"token ids of {param} must be from 0 to {self.vocabulary - 1}, got "
                f"{str(strange)[:SHOWN_CHARACTERS]}; use the tokenizer of this model, and no text that it has a token "
                f"for and the model has not",
                param=param,
            )
        return ids
