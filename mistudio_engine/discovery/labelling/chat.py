"""A language model that is asked for text: what a labeller or a scorer needs of it, and no more.

A question goes out as a system and a user message and comes back as JSON of a given schema, or as an error of ours.
Who answers (OpenAI, Ollama, another server) is behind `Chat`; it knows nothing of features.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

__all__ = ["Answer", "Chat", "Question"]


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
    n_completion_tokens: int


class Chat(Protocol):
    """Answers questions, several at once; it limits how many, repeats what failed in passing, and counts."""

    @property
    def id(self) -> str:
        """Who answers, such as `openai/gpt-4o-mini`; kept with whatever is made of the answers."""
        ...

    async def ask(self, question: Question) -> Answer:
        """The answer.

        Raises:
            MistudioError: none came, for a reason that another try would not change, or after all tries.
        """
        ...
