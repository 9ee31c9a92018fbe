"""OpenAI's chat completions, at OpenAI and at every server that speaks the same (vLLM, llama.cpp, LM Studio, …).

One request at a time through the official client, whose own retries are off. What a server does not understand (a JSON
schema, a name for the limit, a temperature) is asked for in the next simpler way, which is remembered.
"""

from __future__ import annotations

import asyncio
from typing import Any

import openai

from mistudio_engine.api.errors import BadInput, MistudioError
from mistudio_engine.discovery.labelling.addresses import is_loopback, shown_address
from mistudio_engine.discovery.labelling.chat import Answer, NoAnswer, Question, in_words, n_tokens
from mistudio_engine.discovery.labelling.patient_chat import Passing
from mistudio_engine.discovery.labelling.refusals import meaning_of, said

__all__ = ["OPENAI_URL", "OpenAIServer", "needs_key"]

OPENAI_URL = "https://api.openai.com/v1"

_FORMS = ("json_schema", "json_object", "prompt")
"""How the form of the answer is asked for: strictly, loosely, in words."""

_LIMITS = ("max_tokens", "max_completion_tokens")
"""Names of the limit. The older one is what servers other than OpenAI understand, and newer models there do not."""


class OpenAIServer:
    """A `Server` of OpenAI's protocol.

    Args:
        model: its name there.
        base_url: ends in /v1 as a rule.
        api_key: None where none is needed.
        name: stands before the model in `id`.
        key_setting: the setting that the key is from, for advice.
        temperature: None leaves it to the server.
        timeout_seconds: for one answer, from the first byte sent to the last one received.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str = OPENAI_URL,
        api_key: str | None,
        name: str = "openai",
        key_setting: str = "openai_api_key",
        temperature: float | None = 0.0,
        timeout_seconds: float = 120.0,
    ) -> None:
        self.id = f"{name}/{model}"
        self._model = model
        self._where = shown_address(base_url)
        self._key_setting = key_setting
        self._temperature = temperature
        self._timeout_seconds = timeout_seconds
        self._forms = _FORMS
        self._limits = _LIMITS[::-1] if base_url == OPENAI_URL else _LIMITS
        self._client = openai.AsyncOpenAI(
            api_key=api_key or "none",
            base_url=base_url,
            max_retries=0,
            timeout=timeout_seconds,
            http_client=openai.DefaultAsyncHttpxClient(
                trust_env=not is_loopback(base_url),
                follow_redirects=False,
                timeout=timeout_seconds,
            ),
        )

    async def send(self, question: Question) -> Answer:
        """One request, and simpler ones where the server says that it does not understand it."""
        while True:
            form, limit, temperature = self._forms[0], self._limits[0], self._temperature
            try:
                reply = await self._post(self._request(question, form, limit, temperature))
            except openai.BadRequestError as error:
                meaning = self._meaning(error)
                # What is wrong with the question itself would be wrong with it in every form.
                if isinstance(meaning, NoAnswer) or not self._simpler(error, form, limit, temperature):
                    raise meaning from None
            except openai.APIStatusError as error:
                raise self._meaning(error) from None
            except (openai.APITimeoutError, TimeoutError):
                raise Passing("timeout", "it takes too long", maybe_billed=True) from None
            except openai.APIConnectionError as error:
                raise _disconnected(error) from None
            except (ValueError, RecursionError):  # no JSON at all, or too deep
                raise _garbage() from None
            else:
                return _answer(reply)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _post(self, request: dict[str, Any]) -> Any:
        """The JSON that comes back, as it is: the client's own reading of it believes whatever a server sends."""
        async with asyncio.timeout(self._timeout_seconds):  # the client's is from one byte to the next
            response = await self._client.chat.completions.with_raw_response.create(**request)
            return response.http_response.json()

    def _request(self, question: Question, form: str, limit: str, temperature: float | None) -> dict[str, Any]:
        system = question.system
        request: dict[str, Any] = {limit: question.max_tokens}
        if temperature is not None:
            request["temperature"] = temperature
        if form == "json_schema":
            schema = {"name": question.schema.get("title", "answer"), "schema": question.schema, "strict": True}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        else:
            system += in_words(question.schema)
            if form == "json_object":
                request["response_format"] = {"type": "json_object"}
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question.user}]
        # What is in extra_body is sent as it is. The client would walk through every schema to see whether something in
        # it is to be renamed, which takes longer than all the rest.
        return {"model": self._model, "messages": [], "extra_body": {**request, "messages": messages}}

    def _simpler(self, error: openai.BadRequestError, form: str, limit: str, temperature: float | None) -> bool:
        """Leave out what the server does not understand, if the error is about that; whether to ask again.

        Requests that were under way together fail together: only the first of them changes anything. Each step is
        taken once, so that a server that refuses everything is not asked for ever.
        """
        words = f"{error.param or ''} {error.code or ''} {error.message}".lower()
        if form != "prompt" and any(each in words for each in ("response_format", "json_schema", "json_object")):
            if self._forms[0] == form:
                self._forms = self._forms[1:]
        elif limit in words and limit != self._limits[-1]:
            self._limits = self._limits[-1:]
        elif "temperature" in words and temperature is not None:
            self._temperature = None
        else:
            return False
        return True

    def _meaning(self, error: openai.APIStatusError) -> MistudioError | Passing:
        body = error.body if isinstance(error.body, dict) else {"message": error.body}
        message, code = (body.get("message"), error.code or body.get("type"))
        return meaning_of(
            error.status_code,
            message if isinstance(message, str) else "",
            code=code if isinstance(code, str) else None,
            headers={name.lower(): value for name, value in error.response.headers.items()},
            server=self._where,
            model=self._model,
            key_setting=self._key_setting,
        )


def _disconnected(error: openai.APIConnectionError) -> Passing:
    # By name: the client's HTTP library has changed between versions.
    cause = type(error.__cause__).__name__
    if cause in ("ConnectError", "ConnectTimeout", "UnsupportedProtocol", "ProxyError"):
        return Passing(None, f"nobody listens there ({cause})")
    return Passing("disconnected", f"the connection broke ({cause})", maybe_billed=True)


def _answer(reply: Any) -> Answer:
    """What a completion says.

    Raises:
        Passing: it is none.
        NoAnswer: it was refused, cut off or is empty.
    """
    try:
        choice, usage = reply["choices"][0], reply.get("usage")
        message, ended_by = choice["message"], choice.get("finish_reason")
        text, refusal = _text(message.get("content")), _text(message.get("refusal"))
    except (AttributeError, IndexError, KeyError, TypeError):
        raise _garbage() from None
    counted = usage if isinstance(usage, dict) else {}
    n_prompt, n_completion = (n_tokens(counted.get(f"{side}_tokens")) for side in ("prompt", "completion"))
    answer = Answer(refusal or text, str(reply.get("model") or "")[:200], n_prompt, n_completion)
    if refusal or ended_by == "content_filter":
        raise NoAnswer("refused", f"the model refused: {said(refusal or 'content filter')}", answer=answer)
    if ended_by == "length":
        raise NoAnswer("cut_off", f"the answer was cut off after {n_completion} tokens", answer=answer)
    if not text.strip():
        raise NoAnswer("empty", "the answer is empty", answer=answer)
    return answer


def _text(content: Any) -> str:
    """What a message says; some servers give it in parts.

    Raises:
        TypeError: no text.
    """
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    if not isinstance(content, str | None):
        raise TypeError(content)
    return content or ""


def _garbage() -> Passing:
    return Passing("garbage", "what it answers is not its protocol", maybe_billed=True)


def needs_key(base_url: str, api_key: str | None) -> None:
    """Refuse to go to OpenAI itself without a key, which would only be told so many times, or with an impossible one.

    Raises:
        BadInput: there is none, or it fits into no request.
    """
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):  # as in “sk-…”
        raise BadInput(
            "The key for OpenAI holds characters that no key has.",
            fix="Copy it again, without quotation marks, into OPENAI_API_KEY in the engine's environment; or ask a "
            "person to set it: set_setting(key='openai_api_key', value=…).",
        )
    if api_key is None and base_url == OPENAI_URL:
        raise BadInput(
            "There is no key for OpenAI.",
            fix="Ask a person to set it: set_setting(key='openai_api_key', value=…), or OPENAI_API_KEY in the engine's "
            "environment. Ollama and token_pattern need none.",
        )
