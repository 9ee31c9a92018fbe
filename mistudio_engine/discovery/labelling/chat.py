"""A language model that is asked for text: what a labeller or a scorer needs of it, and no more.

A question goes out as a system and a user message and comes back as JSON of a given schema, or as an error of ours.
Who answers (OpenAI, Ollama, another server) is behind `Chat`; it knows nothing of features.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from mistudio_engine.api.errors import MistudioError

__all__ = ["Answer", "Chat", "NoAnswer", "NoAnswerReason", "Question", "in_words", "n_tokens"]

_MOST_TOKENS = 100_000_000

NoAnswerReason = Literal[
    "refused", "cut_off", "empty", "prompt_too_long", "timeout", "disconnected", "overloaded", "server_error", "garbage"
]


class Question(NamedTuple):
    """What is asked."""

    system: str
    user: str
    schema: dict[str, Any]
    """JSON schema of the answer; its `title` names it."""

    max_tokens: int = 512


class Answer(NamedTuple):
    """What came back, as it came."""

    text: str
    """What the model wrote: JSON of the schema if it kept to it; whoever asked parses it."""

    model: str
    """Which model said that it answered."""

    n_prompt_tokens: int
    """As the server counted them, see `n_tokens`; 0 where it did not."""

    n_completion_tokens: int


class NoAnswer(MistudioError):
    """This question got no answer; another one may.

    Args:
        reason: refused: the model would not. cut_off: it reached `max_tokens`. empty: it wrote nothing.
            prompt_too_long: the question does not fit into its context. The others are faults that did not pass in
            all tries: timeout, disconnected, overloaded (429), server_error (5xx), garbage (not the protocol).
        detail: what the server said, in a few words and without secrets.
        answer: what came nevertheless.
    """

    code: ClassVar[str] = "no_answer"
    status: ClassVar[int] = 502

    def __init__(self, reason: NoAnswerReason, detail: str, *, answer: Answer | None = None) -> None:
        super().__init__(f"The language model gave no answer: {detail}", fix="Ask again, or ask another model.")
        self.reason: NoAnswerReason = reason
        self.detail = detail
        self.answer = answer


class Chat(Protocol):
    """Answers questions, several at once; it limits how many, repeats what failed in passing, and counts."""

    @property
    def id(self) -> str:
        """Who answers, such as `openai/gpt-4o-mini`; kept with whatever is made of the answers."""
        ...

    async def ask(self, question: Question) -> Answer:
        """The answer.

        Raises:
            NoAnswer: none came to this question, for a reason that another try would not change, or after all tries.
            MistudioError: no question will be answered: a wrong key, an unknown model, a server that is not there.
        """
        ...


def in_words(schema: dict[str, Any]) -> str:
    """What to add to a system message where a server takes no schema."""
    form = json.dumps(schema, ensure_ascii=False)
    return f"\n\nAnswer with one JSON object of this JSON schema, and nothing else:\n{form}"


def n_tokens(said: object) -> int:
    """How many tokens a server says that it counted; 0, which is not known, where that cannot be a number of them."""
    if not isinstance(said, int) or isinstance(said, bool):
        return 0
    return said if 0 < said <= _MOST_TOKENS else 0
