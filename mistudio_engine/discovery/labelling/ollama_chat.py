"""Ollama's chat, one request at a time through the official client. It pulls no model and starts no server."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import ollama

from mistudio_engine.api.errors import MistudioError
from mistudio_engine.discovery.labelling.addresses import is_loopback, shown_address
from mistudio_engine.discovery.labelling.budget import n_bytes_of
from mistudio_engine.discovery.labelling.chat import Answer, NoAnswer, Question, in_words, n_tokens
from mistudio_engine.discovery.labelling.patient_chat import Passing
from mistudio_engine.discovery.labelling.refusals import meaning_of, retry_after_seconds

__all__ = ["OLLAMA_URL", "OllamaServer"]

OLLAMA_URL = "http://127.0.0.1:11434"

_SMALLEST_CONTEXT = 8192
"""Ollama cuts a longer prompt from its beginning without a word, so the context is always asked for."""


class OllamaServer:
    """A `Server` of Ollama's protocol.

    Args:
        model: its name there, such as `llama3.2`.
        base_url: where Ollama listens.
        temperature: None leaves it to the model.
        timeout_seconds: for one answer, loading the model included.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str = OLLAMA_URL,
        temperature: float | None = 0.0,
        timeout_seconds: float = 300.0,
    ) -> None:
        self.id = f"ollama/{model}"
        self._model = model
        self._where = shown_address(base_url)
        self._temperature = temperature
        self._timeout_seconds = timeout_seconds
        self._context = _SMALLEST_CONTEXT
        self._with_schema = True
        self._client = ollama.AsyncClient(
            host=base_url,
            follow_redirects=False,
            timeout=httpx.Timeout(timeout_seconds, connect=10.0),
            trust_env=not is_loopback(base_url),
            limits=httpx.Limits(max_connections=None),
            event_hooks={"response": [self._look]},
        )

    async def send(self, question: Question) -> Answer:
        """One request, and a simpler one where the server is too old for a schema."""
        with_schema = self._with_schema
        try:
            async with asyncio.timeout(self._timeout_seconds):  # the client's is from one byte to the next
                reply = await self._client.chat(**self._request(question, with_schema), stream=False)
        except ollama.ResponseError as error:
            if error.status_code in (400, 500) and with_schema and "format" in str(error.error).lower():
                self._with_schema = False
                return await self.send(question)
            raise self._meaning(error) from None
        except (ConnectionError, httpx.ConnectTimeout):
            raise Passing(None, "nobody listens there; is Ollama running (ollama serve)?") from None
        except (httpx.TimeoutException, TimeoutError):
            raise Passing("timeout", "it takes too long", maybe_billed=True) from None
        except httpx.HTTPError as error:
            raise Passing("disconnected", f"the connection broke ({type(error).__name__})", maybe_billed=True) from None
        except (ValueError, TypeError, RecursionError):  # no JSON, or not of the protocol
            raise Passing("garbage", "what it answers is not its protocol", maybe_billed=True) from None
        return _answer(reply)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def _request(self, question: Question, with_schema: bool) -> dict[str, Any]:
        options: dict[str, Any] = {"num_predict": question.max_tokens, "num_ctx": self._context_for(question)}
        if self._temperature is not None:
            options["temperature"] = self._temperature
        system = question.system if with_schema else question.system + in_words(question.schema)
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question.user}]
        form = question.schema if with_schema else "json"
        return {"model": self._model, "messages": messages, "format": form, "options": options}

    def _meaning(self, error: ollama.ResponseError) -> MistudioError | Passing:
        return meaning_of(
            error.status_code,
            str(error.error),
            code=None,
            headers={},
            server=self._where,
            model=self._model,
            key_setting="labelling_api_key",
        )

    def _context_for(self, question: Question) -> int:
        """A context in which the question surely fits. It grows by doubling: each change loads the model anew.

        English has about four bytes to a token, and scripts whose characters have three bytes two to three.
        """
        needed = n_bytes_of(question) // 2 + question.max_tokens
        while self._context < needed:
            self._context *= 2
        return self._context

    async def _look(self, response: httpx.Response) -> None:
        """The client's errors do not carry the header that says when to come again."""
        if response.status_code in (429, 503) and (asked := response.headers.get("retry-after")) is not None:
            reason = "overloaded" if response.status_code == 429 else "server_error"
            detail = f"it has too much to do ({response.status_code})"
            raise Passing(reason, detail, after_seconds=retry_after_seconds(asked))


def _answer(reply: ollama.ChatResponse) -> Answer:
    text = reply.message.content or ""
    n_prompt, n_completion = n_tokens(reply.prompt_eval_count), n_tokens(reply.eval_count)
    answer = Answer(text, (reply.model or "")[:200], n_prompt, n_completion)
    if reply.done_reason == "length":
        raise NoAnswer("cut_off", f"the answer was cut off after {n_completion} tokens", answer=answer)
    if not text.strip():
        raise NoAnswer("empty", "the answer is empty", answer=answer)
    return answer
