"""Embedders that are servers: OpenAI and whatever speaks its protocol, and Ollama.

Texts go out in batches through the official clients; what fails in passing is tried again a few times, then it is an
error of ours. The dimension is what the server's first vector has. It knows no setting and no index.
"""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import numpy as np
import ollama
import openai
from numpy.typing import NDArray

from mistudio_engine.api.errors import CorruptFile, Internal, MistudioError, Unreachable
from mistudio_engine.discovery.labelling.addresses import is_loopback, shown_address
from mistudio_engine.discovery.labelling.chat import NoAnswer
from mistudio_engine.discovery.labelling.openai_chat import OPENAI_URL, needs_key
from mistudio_engine.discovery.labelling.patient_chat import Passing
from mistudio_engine.discovery.labelling.refusals import meaning_of

__all__ = ["OllamaEmbedder", "OpenAIEmbedder"]

BATCH = 64
"""Texts to a request; labels and top tokens are short, and servers of one's own have small limits."""

N_TRIES = 3
FIRST_BACKOFF_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 8.0

TIMEOUT_SECONDS = 20.0


class _ServerEmbedder(ABC):
    """An embedder at an address.

    Args:
        id: which protocol, model and address. It does not tell models apart that answer to one name one after the
            other; whoever keeps vectors has to compare.
        model: its name there.
        base_url: where the server is.
        redact: takes secrets out of a server's words.
        close: closes the connections.
    """

    asks_differently = False

    def __init__(
        self, id: str, model: str, base_url: str, redact: Callable[[str], str], close: Callable[[], object]
    ) -> None:
        self.id = id
        self._close = close
        self._model, self._where, self._redact = model, shown_address(base_url), redact
        self._dimension: int | None = None

    @property
    def dimension(self) -> int:
        """Length of a vector; known from the first answer on."""
        if self._dimension is None:
            raise Internal(
                f"The dimension of {self.id} is not known before its first vector.", fix="Embed a text first."
            )
        return self._dimension

    def close(self) -> None:
        """Close the connections."""
        self._close()

    def embed(self, texts: Sequence[str], *, is_query: bool = False) -> NDArray[np.float32]:
        """(n, dimension), each row of L2 norm 1.

        Raises:
            Unreachable: it did not answer after several tries, or the embedder is closed.
            BadInput: it has no such model, or refuses the key or the text.
            CorruptFile: what it answers is no vectors of one length.
        """
        parts = [self._batch(list(texts[at : at + BATCH])) for at in range(0, len(texts), BATCH)]
        return np.concatenate(parts) if parts else np.zeros((0, self.dimension), np.float32)

    def _batch(self, texts: list[str]) -> NDArray[np.float32]:
        vectors = self._checked(self._patiently(texts), len(texts))
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def _patiently(self, texts: list[str]) -> Any:
        for attempt in range(N_TRIES):
            try:
                return self._ask(texts)
            except Passing as error:
                if attempt == N_TRIES - 1:
                    raise Unreachable(
                        f"{self._where} gave no vectors: {self._redact(error.detail)}.",
                        why=f"It was asked {N_TRIES} times.",
                        fix="Start the server or look at its log; or choose another embedder (set_setting).",
                    ) from None
                # Full jitter, and as long as the server asks for, within what somebody waits.
                backoff = random.uniform(0, FIRST_BACKOFF_SECONDS * 2**attempt)
                time.sleep(min(LONGEST_WAIT_SECONDS, max(backoff, error.after_seconds or 0.0)))
            except NoAnswer as error:
                raise Unreachable(f"{self._where} gave no vectors: {self._redact(str(error))}.") from None
            except RuntimeError as error:  # httpx, of a client that somebody closed
                raise Unreachable(f"{self._where} is not asked any more.", why="The embedder was changed.") from error
        raise AssertionError("the last try returns or raises")

    def _checked(self, answer: Any, n_texts: int) -> NDArray[np.float64]:
        try:
            vectors = np.asarray(answer, np.float64)
        except (TypeError, ValueError):
            vectors = np.zeros(0)
        n_numbers = self._dimension or (vectors.shape[-1] if vectors.ndim == 2 else 0)
        norms = np.linalg.norm(vectors, axis=-1) if vectors.shape == (n_texts, n_numbers) and n_numbers else np.zeros(1)
        if not (np.isfinite(norms).all() and (norms > 0).all()):
            raise CorruptFile(
                f"{self._where} did not answer {n_texts} texts with as many vectors of one length.",
                why=f"The answer has the shape {vectors.shape}" + (f", not (…, {n_numbers})." if n_numbers else "."),
                fix=f"Check that {self._model} is an embedding model.",
            )
        self._dimension = n_numbers
        return vectors

    @abstractmethod
    def _ask(self, texts: list[str]) -> Any:
        """The vectors of one request; Passing where another try may succeed."""

    def _meaning(self, status: int, message: str, code: str | None, headers: Any) -> MistudioError | Passing:
        return meaning_of(
            status,
            self._redact(message),
            code=code,
            headers={name.lower(): value for name, value in headers.items()},
            server=self._where,
            model=self._model,
            key_setting="openai_api_key",
        )


class OpenAIEmbedder(_ServerEmbedder):
    """Embeddings of OpenAI, or of a server that speaks its protocol.

    Args:
        model: such as `text-embedding-3-small`.
        base_url: ends in /v1 as a rule.
        api_key: None where none is needed.
        redact: takes secrets out of a server's words.

    Raises:
        BadInput: OpenAI itself, without a key.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str = OPENAI_URL,
        api_key: str | None = None,
        redact: Callable[[str], str] = str,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        needs_key(base_url, api_key)
        self._client = openai.OpenAI(
            api_key=api_key or "none",
            base_url=base_url,
            max_retries=0,
            timeout=timeout_seconds,
            http_client=openai.DefaultHttpxClient(
                trust_env=not is_loopback(base_url), follow_redirects=False, timeout=timeout_seconds
            ),
        )
        super().__init__(f"openai:{model}@{shown_address(base_url)}", model, base_url, redact, self._client.close)

    def _ask(self, texts: list[str]) -> Any:
        try:
            # As numbers: the client asks for base64 by itself, which not every server knows.
            reply = self._client.embeddings.create(model=self._model, input=texts, encoding_format="float")
            return [each.embedding for each in sorted(reply.data, key=lambda each: each.index)]
        except openai.APIStatusError as error:
            body = error.body if isinstance(error.body, dict) else {}
            raise self._meaning(
                error.status_code, str(body.get("message") or error.body or ""), error.code, error.response.headers
            ) from None
        except openai.APITimeoutError:
            raise Passing("timeout", "it takes too long") from None
        except openai.APIConnectionError as error:
            raise Passing(None, f"the connection failed ({type(error.__cause__).__name__})") from None
        except (openai.APIResponseValidationError, AttributeError, TypeError, ValueError):
            raise Passing("garbage", "what it answers is not its protocol") from None


class OllamaEmbedder(_ServerEmbedder):
    """Embeddings of Ollama. It pulls no model.

    Args:
        model: its name there, such as `nomic-embed-text`.
        base_url: where Ollama listens.
        redact: takes secrets out of a server's words.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str,
        redact: Callable[[str], str] = str,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        self._client = ollama.Client(
            host=base_url,
            follow_redirects=False,
            timeout=httpx.Timeout(timeout_seconds, connect=5.0),
            trust_env=not is_loopback(base_url),
        )
        super().__init__(f"ollama:{model}@{shown_address(base_url)}", model, base_url, redact, self._client.close)

    def _ask(self, texts: list[str]) -> Any:
        try:
            return self._client.embed(model=self._model, input=texts, truncate=True).embeddings
        except ollama.ResponseError as error:
            raise self._meaning(error.status_code, str(error.error), None, {}) from None
        except ConnectionError:
            raise Passing(None, "nobody listens there; is Ollama running (ollama serve)?") from None
        except httpx.TimeoutException:
            raise Passing("timeout", "it takes too long") from None
        except httpx.HTTPError as error:
            raise Passing("disconnected", f"the connection broke ({type(error).__name__})") from None
        except (TypeError, ValueError):
            raise Passing("garbage", "what it answers is not its protocol") from None
