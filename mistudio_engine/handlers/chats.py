"""Which language model is asked, where, with which key and at what price: from a call's arguments and the settings.

Everything that asks one (labels, scores) opens its chat here, so that the rules are the same: agents choose no address,
nothing leaves the machine while it is offline, and keys go to the server that they are for and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self

from mistudio_engine.api.errors import BadInput, Conflict
from mistudio_engine.api.operations.labels import LabelFeatures
from mistudio_engine.api.operations.scores import ScoreLabels
from mistudio_engine.discovery.labelling.addresses import check_address
from mistudio_engine.discovery.labelling.budget import Budget, Prices
from mistudio_engine.discovery.labelling.patient_chat import PatientChat
from mistudio_engine.handlers.settings import require_person, setting
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.secrets import Secrets

__all__ = [
    "Connection",
    "budget_for",
    "connection",
    "keys_fit",
    "open_chat",
    "require_person_for_address",
    "still_allowed",
]


ADDRESSES: dict[str, Any] = {
    "openai": "openai_base_url",
    "ollama": "ollama_base_url",
    "compatible": "labelling_base_url",
}
"""The setting that says where a provider's server is."""

KEYS = {"openai": "openai_api_key", "compatible": "labelling_api_key"}
"""The secret that is meant for it."""


class Connection(NamedTuple):
    """Whom to ask. It holds no key."""

    provider: str
    """openai, ollama or compatible."""

    model: str
    base_url: str
    prices: Prices | None
    """None where nobody has said what it costs."""

    @property
    def id(self) -> str:
        """As of `Chat`."""
        return f"{self.provider}/{self.model}"

    def as_data(self) -> dict[str, Any]:
        """For people to see, and for a job to keep."""
        prices = (None, None) if self.prices is None else self.prices
        return {
            "provider": self.provider,
            "model": self.model,
            "base_url": self.base_url,
            "price_per_million_input": prices[0],
            "price_per_million_output": prices[1],
        }

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Self:
        """From what `as_data` gave."""
        per_input, per_output = data["price_per_million_input"], data["price_per_million_output"]
        prices = None if per_input is None else Prices(per_input, per_output)
        return cls(data["provider"], data["model"], data["base_url"], prices)


def require_person_for_address(base_url: str | None) -> None:
    """Refuse an address that an agent gives; to be called while the call is handled, not in its job.

    Raises:
        Forbidden: an agent gave one.
    """
    if base_url is not None:
        require_person("say which server is asked (base_url); without it the setting labelling_base_url counts")


def connection(operation: LabelFeatures | ScoreLabels, engine: Engine, provider: str) -> Connection:
    """Whom a call asks: what it says itself, else what is set.

    Raises:
        BadInput: no model, no address, no key where one is needed, or an address that is none.
        Unsupported: the engine is offline and the server is elsewhere.
    """
    model = operation.model or setting(engine, "labelling_model")
    if model is None:
        raise BadInput(
            f"Which model of {provider} is to be asked?",
            fix="Give model, such as gpt-4o-mini or llama3.2, or set labelling_model (set_setting).",
        )
    address = operation.base_url or setting(engine, ADDRESSES[provider])
    if address is None:
        raise BadInput(
            "Where does the OpenAI-compatible server listen?",
            fix="Ask a person to set it: set_setting(key='labelling_base_url', value='http://127.0.0.1:8000/v1').",
        )
    found = Connection(
        provider,
        model,
        check_address(address),
        _prices(engine, provider, operation.price_per_million_input, operation.price_per_million_output),
    )
    still_allowed(engine, found)
    return found


def still_allowed(engine: Engine, to: Connection) -> None:
    """Refuse a connection that this engine cannot make now: keys and the network are not settled with a job.

    Raises:
        BadInput: there is no key where one is needed.
        Unsupported: the engine is offline and the server is elsewhere.
    """
    check_address(to.base_url, offline=engine.offline)
    if to.provider == "openai":
        from mistudio_engine.discovery.labelling.openai_chat import needs_key  # its client is slow to import

        needs_key(to.base_url, _key(engine, to))


def keys_fit(engine: Engine, to: Connection) -> None:
    """Refuse a server that is no longer the one that is set, where a key would be sent: it may be the other one's.

    Raises:
        Conflict: the address was changed since.
    """
    now = setting(engine, ADDRESSES[to.provider])
    if _key(engine, to) is not None and (now is None or check_address(now) != to.base_url):
        raise Conflict(
            f"The job asks {to.base_url}, and {ADDRESSES[to.provider]} is {now} by now.",
            why=f"{KEYS[to.provider]} may be the key of that server, and is not sent to another one.",
            fix=f"Set {ADDRESSES[to.provider]} back, or retry the job: it then asks the server that is set.",
        )


def _prices(engine: Engine, provider: str, per_input: float | None, per_output: float | None) -> Prices | None:
    if provider == "ollama" and per_input is None and per_output is None:
        return Prices(0.0, 0.0)
    per_input = setting(engine, "price_per_million_input") if per_input is None else per_input
    per_output = setting(engine, "price_per_million_output") if per_output is None else per_output
    if (per_input is None) != (per_output is None):
        missing = "price_per_million_output" if per_output is None else "price_per_million_input"
        raise BadInput(f"{missing} is missing.", why="The other price is there.", fix="Give both, or neither.")
    return None if per_input is None or per_output is None else Prices(per_input, per_output)


def budget_for(
    to: Connection, max_usd: float | None, spent: float = 0.0, note: Callable[[float], object] | None = None
) -> Budget:
    """The money of a job; `note` is as of `Budget`.

    Raises:
        BadInput: it has a cap, and nobody has said what the model costs.
    """
    if max_usd is not None and to.prices is None:
        raise BadInput(
            f"max_usd = {max_usd:g} cannot be kept to: nobody has said what {to.id} costs.",
            fix="Give price_per_million_input and price_per_million_output in US dollars, from the provider's page.",
        )
    return Budget(to.prices, max_usd, spent, note)


def _key(engine: Engine, to: Connection) -> str | None:
    """The key that is meant for this server; never another one's."""
    return Secrets(engine.home).get(KEYS[to.provider]) if to.provider in KEYS else None


def open_chat(
    engine: Engine, to: Connection, *, temperature: float = 0.0, n_parallel: int = 8, budget: Budget | None = None
) -> PatientChat:
    """A chat with it, for the event loop that first asks it; close it there."""
    if to.provider == "ollama":
        from mistudio_engine.discovery.labelling.ollama_chat import OllamaServer

        server = OllamaServer(to.model, base_url=to.base_url, temperature=temperature)
    else:
        from mistudio_engine.discovery.labelling.openai_chat import OpenAIServer

        server = OpenAIServer(
            to.model,
            base_url=to.base_url,
            api_key=_key(engine, to),
            name=to.provider,
            key_setting=KEYS[to.provider],
            temperature=temperature,
        )
    return PatientChat(server, n_parallel=n_parallel, budget=budget, redact=Secrets(engine.home).redact)
