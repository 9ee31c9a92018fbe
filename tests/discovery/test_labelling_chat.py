"""A chat repeats what passes, no more at once than it may, and says at once what will not pass; by both protocols."""

from __future__ import annotations

import asyncio
import json
import socket
import time
import traceback
from collections.abc import Awaitable, Callable

import pytest
from labelling_data import patient

from mistudio_engine.api.errors import BadInput, MistudioError, Unreachable, Unsupported
from mistudio_engine.discovery.labelling.addresses import check_address, is_loopback
from mistudio_engine.discovery.labelling.chat import Answer, NoAnswer, Question
from mistudio_engine.discovery.labelling.ollama_chat import OllamaServer
from mistudio_engine.discovery.labelling.openai_chat import OPENAI_URL, OpenAIServer, needs_key
from mistudio_engine.discovery.labelling.patient_chat import PatientChat
from mistudio_engine.discovery.labelling.refusals import retry_after_seconds
from tests.llm_server import GARBAGE, LLMServer, Reply, script, serve_llm

SCHEMA = {"title": "reply", "type": "object", "properties": {"label": {"type": "string"}}, "required": ["label"]}
QUESTION = Question("You label.", "What is it?", SCHEMA)
KEY = "sk-test-0123456789abcdefghij"

BOTH = pytest.mark.parametrize("protocol", ["openai", "ollama"])


def server_of(protocol: str, server: LLMServer, **settings) -> OpenAIServer | OllamaServer:
    if protocol == "openai":
        return OpenAIServer("m", base_url=server.openai_url, api_key=KEY, **settings)
    return OllamaServer("m", base_url=server.ollama_url, **settings)


def run(server: OpenAIServer | OllamaServer, work: Callable[[PatientChat], Awaitable], **settings) -> object:
    async def all_of_it() -> object:
        chat = patient(server, **settings)
        try:
            return await work(chat)
        finally:
            await chat.close()

    return asyncio.run(all_of_it())


def ask(protocol: str, server: LLMServer, question: Question = QUESTION, **settings) -> Answer:
    return run(server_of(protocol, server), lambda chat: chat.ask(question), **settings)  # type: ignore[return-value]


@BOTH
def test_a_question_is_asked_with_its_schema_and_answered_with_the_usage(protocol):
    with serve_llm(lambda request: Reply({"label": "cats"}, n_prompt_tokens=12, n_completion_tokens=5)) as server:
        answer = ask(protocol, server)
        (request,) = server.requests
    assert answer == Answer('{"label": "cats"}', "m", 12, 5)
    assert (request.system, request.user, request.schema) == ("You label.", "What is it?", SCHEMA)
    assert request.authorization == (f"Bearer {KEY}" if protocol == "openai" else None)


@BOTH
@pytest.mark.parametrize(
    "fault",
    [
        Reply("slow down", status=429),
        Reply("broken", status=500),
        Reply("bad gateway", status=502),
        Reply("later", status=503),
        Reply("overloaded", status=529),
        Reply({"label": "cats"}, cut=True),
        GARBAGE,
        Reply(raw=b'{"message"'),
        Reply(raw=b"{}"),
        Reply(raw=b"[1, 2]"),
        Reply(raw=b"null"),
        Reply(raw=b"[" * 100_000 + b"]" * 100_000),
        Reply(raw=b'{"choices": [{"message": {"content": 7}}], "message": {"content": 7}}'),
        Reply(raw=b'{"choices": [{"message": {"content": [7]}}], "message": {"content": [7]}}'),
        Reply(raw=b'{"choices": [{"message": "cats"}], "message": "cats"}'),
    ],
    ids=[
        *("429", "500", "502", "503", "529", "cut", "html", "torn", "empty envelope"),
        *("list", "null", "deep", "number", "list of numbers", "no message"),
    ],
)
def test_what_passes_is_asked_again(protocol, fault):
    with serve_llm(script(fault, fault, {"label": "cats"})) as server:
        assert json.loads(ask(protocol, server).text) == {"label": "cats"}
        assert len(server.requests) == 3


@BOTH
@pytest.mark.parametrize("status", [429, 503])
def test_a_server_is_left_alone_for_as_long_as_it_asks(protocol, status):
    with serve_llm(script(Reply("wait", status=status, headers={"Retry-After": "0.5"}), {"label": "cats"})) as server:
        began_at = time.monotonic()
        ask(protocol, server)
        assert 0.5 <= time.monotonic() - began_at < 2


@pytest.mark.parametrize(
    ("value", "milliseconds", "seconds"),
    [
        ("2", None, 2),
        ("0.5", None, 0.5),
        ("-3", None, 0),
        (None, "250", 0.25),
        (None, None, None),
        ("soon", None, None),
        ("nan", None, 0),
        ("31536000", None, 31536000),
        ("Mon, 01 Jan 0001 00:00:00 -0000", None, 0),
        ("Mon, 01 Jan 99999 00:00:00 GMT", None, None),
    ],
)
def test_how_long_a_server_asks_for(value, milliseconds, seconds):
    assert retry_after_seconds(value, milliseconds) == seconds


def test_a_server_that_asks_for_a_year_is_asked_again_after_minutes():
    chat = patient(OpenAIServer("m", base_url="http://127.0.0.1:9/v1", api_key=KEY))
    assert chat._wait_seconds(1, 31536000.0) < 310 and chat._wait_seconds(1, float("inf")) < 310


@pytest.mark.parametrize(
    "usage",
    [
        None,
        [],
        "many",
        {"prompt_tokens": -5, "completion_tokens": -1},
        {"prompt_tokens": "12", "completion_tokens": True},
        {"prompt_tokens": 1e9, "completion_tokens": 10**30},
    ],
    ids=["none", "list", "word", "negative", "other types", "huge"],
)
def test_what_is_no_count_of_tokens_is_taken_for_none_and_the_answer_counts(usage):
    envelope = {"model": "m", "choices": [{"message": {"content": "cats"}}], "usage": usage}
    with serve_llm(lambda request: Reply(raw=json.dumps(envelope).encode())) as server:
        assert ask("openai", server) == Answer("cats", "m", 0, 0)


def test_ollamas_counts_are_not_believed_either():
    with serve_llm(lambda request: Reply("cats", n_prompt_tokens=-5, n_completion_tokens=10**12)) as server:
        assert ask("ollama", server) == Answer("cats", "m", 0, 0)


def test_an_answer_in_parts_is_put_together():
    parts = [{"type": "text", "text": "ca"}, {"type": "text", "text": "ts"}]
    envelope = {"choices": [{"message": {"content": parts}}]}
    with serve_llm(lambda request: Reply(raw=json.dumps(envelope).encode())) as server:
        assert ask("openai", server).text == "cats"


@BOTH
def test_an_answer_that_trickles_in_for_ever_takes_too_long(protocol):
    with serve_llm(lambda request: Reply({"label": "cats"}, byte_seconds=0.02)) as server:
        asked = server_of(protocol, server, timeout_seconds=0.3)
        with pytest.raises(NoAnswer, match="it takes too long") as failed:
            run(asked, lambda chat: chat.ask(QUESTION), n_tries=1)
    assert failed.value.reason == "timeout"


@BOTH
def test_a_server_that_hangs_up_after_each_answer_is_asked_on(protocol):
    async def ask_all(chat: PatientChat) -> list:
        return await asyncio.gather(*(chat.ask(QUESTION) for _ in range(40)))

    with serve_llm(lambda request: Reply({"label": "cats"}, hangs_up=True)) as server:
        assert len(run(server_of(protocol, server), ask_all, n_parallel=4)) == 40  # type: ignore[arg-type]
        assert len(server.requests) < 50


def test_a_date_says_it_too():
    assert retry_after_seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert retry_after_seconds("Wed, 21 Oct 2099 07:28:00 GMT") > 1e9  # type: ignore[operator]


@BOTH
@pytest.mark.parametrize(
    ("fault", "reason"),
    [(Reply("no", status=429), "overloaded"), (Reply("no", status=500), "server_error"), (GARBAGE, "garbage")],
    ids=["429", "500", "html"],
)
def test_what_does_not_pass_in_all_tries_is_said_with_its_reason(protocol, fault, reason):
    with serve_llm(lambda request: fault) as server:
        with pytest.raises(NoAnswer) as failed:
            ask(protocol, server, n_tries=3)
        assert len(server.requests) == 3
    assert failed.value.reason == reason and "3 tries" in failed.value.detail


@BOTH
def test_a_server_that_answers_nobody_for_a_while_is_taken_to_be_down(protocol):
    async def ask_all(chat: PatientChat) -> list:
        return await asyncio.gather(*(chat.ask(QUESTION) for _ in range(8)), return_exceptions=True)

    with serve_llm(lambda request: Reply("no", status=500)) as server:
        ended = run(server_of(protocol, server), ask_all, n_tries=2)
    assert sum(isinstance(each, Unreachable) for each in ended) == 4  # type: ignore[attr-defined]


@BOTH
def test_a_server_that_answers_no_more_than_half_a_sentence_is_not_down(protocol):
    async def ask_in_turn(chat: PatientChat) -> list:
        return [(await asyncio.gather(chat.ask(QUESTION), return_exceptions=True))[0] for _ in range(14)]

    with serve_llm(lambda request: Reply("{", finish_reason="length") if request.number % 2 else GARBAGE) as server:
        ended = run(server_of(protocol, server), ask_in_turn, n_tries=1)
    assert [each.reason for each in ended] == ["garbage", "cut_off"] * 7  # type: ignore[attr-defined]


@BOTH
def test_nobody_listening_is_said_after_a_few_tries(protocol):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        nobody = LLMServer(f"http://127.0.0.1:{taken.getsockname()[1]}", lambda request: "")
        with pytest.raises(Unreachable, match="nobody listens") as failed:
            ask(protocol, nobody, n_tries=2)
    assert failed.value.fix


@BOTH
def test_a_server_that_is_too_slow_is_asked_again(protocol):
    with serve_llm(script(Reply({}, latency=1.5), {"label": "cats"})) as server:
        made = server_of(protocol, server, timeout_seconds=0.3)
        answer = run(made, lambda chat: chat.ask(QUESTION))
    assert "cats" in answer.text  # type: ignore[attr-defined]


@BOTH
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Reply("Incorrect API key", status=401, error_code="invalid_api_key"), "refused the key"),
        (Reply("not yours", status=403), "refused the key"),
        (Reply("no such model", status=404, error_code="model_not_found"), "no model 'm'"),
        (Reply("seed must be odd", status=400), "seed must be odd"),
        (Reply("You exceeded your current quota", status=429, error_code="insufficient_quota"), "quota"),
    ],
    ids=["401", "403", "404", "400", "quota"],
)
def test_what_will_not_pass_is_said_at_once_with_advice(protocol, fault, says):
    with serve_llm(lambda request: fault) as server:
        with pytest.raises(BadInput, match=says) as refused:
            ask(protocol, server)
        assert len(server.requests) == 1
    assert refused.value.fix


@BOTH
def test_a_prompt_that_is_too_long_is_a_matter_of_its_question(protocol):
    too_long = Reply("This model's maximum context length is 8192 tokens", status=400)
    with serve_llm(lambda request: too_long) as server, pytest.raises(NoAnswer) as failed:
        ask(protocol, server)
    assert failed.value.reason == "prompt_too_long"


@pytest.mark.parametrize(
    ("says", "reason", "n_requests"),
    [
        (
            "'max_tokens' or 'max_completion_tokens' is too large: 400. This model's maximum context length is 2048 "
            "tokens and your request has 1900 input tokens (400 > 2048 - 1900)",
            "prompt_too_long",
            1,
        ),
        ("set neither max_tokens nor max_completion_tokens nor temperature", None, 3),
    ],
    ids=["as vLLM says it", "refuses everything"],
)
def test_a_server_that_names_both_limits_is_not_asked_with_one_and_the_other_for_ever(says, reason, n_requests):
    async def soon(chat: PatientChat) -> Answer:
        async with asyncio.timeout(5):
            return await chat.ask(QUESTION)

    with serve_llm(lambda request: Reply(says, status=400)) as server:
        with pytest.raises(MistudioError) as failed:
            run(server_of("openai", server), soon)
        assert len(server.requests) == n_requests
    assert getattr(failed.value, "reason", None) == reason


@BOTH
def test_half_a_character_in_an_answer_is_not_passed_on(protocol):
    """A server that cuts an emoji in two sends a lone surrogate, which neither SQLite nor UTF-8 takes."""
    openai = {"choices": [{"index": 0, "message": {"content": "cats \ud83d"}, "finish_reason": "stop"}], "model": "m"}
    body = openai if protocol == "openai" else {"message": {"role": "assistant", "content": "cats \ud83d"}}
    with serve_llm(lambda request: Reply(raw=json.dumps(body).encode())) as server:
        answer = ask(protocol, server)
    assert answer.text == "cats ?"


@BOTH
@pytest.mark.parametrize(
    ("reply", "reason"),
    [(Reply('{"label": "ca', finish_reason="length"), "cut_off"), (Reply(" \n"), "empty")],
    ids=["length", "blank"],
)
def test_an_answer_that_is_none_is_kept_with_its_usage(protocol, reply, reason):
    with serve_llm(lambda request: reply) as server, pytest.raises(NoAnswer) as failed:
        ask(protocol, server)
    assert failed.value.reason == reason
    assert failed.value.answer is not None and failed.value.answer.text == reply.content


@pytest.mark.parametrize(
    "reply",
    [Reply(refusal="I cannot help"), Reply("x", finish_reason="content_filter"), Reply("content policy", status=400)],
    ids=["refusal", "filter", "policy"],
)
def test_a_refusal_is_one(reply):
    with serve_llm(lambda request: reply) as server, pytest.raises(NoAnswer) as failed:
        ask("openai", server)
    assert failed.value.reason == "refused"


def test_a_server_without_schemas_is_asked_more_simply_and_that_is_remembered():
    async def twice(chat: PatientChat) -> None:
        await chat.ask(QUESTION)
        await chat.ask(QUESTION)

    for accepts, forms in (
        (("json_object", None), ["json_schema", "json_object", "json_object"]),
        ((None,), ["json_schema", "json_object", None, None]),
    ):
        with serve_llm(lambda request: {"label": "cats"}, accepts=accepts) as server:
            run(server_of("openai", server), twice)
            assert [request.response_format for request in server.requests] == forms
            assert '"label"' in server.requests[-1].system, "the schema is told in words"


def test_an_ollama_without_schemas_is_asked_for_json():
    with serve_llm(lambda request: {"label": "cats"}, accepts=("json_object",)) as server:
        ask("ollama", server)
        assert [request.response_format for request in server.requests] == ["json_schema", "json_object"]


def test_newer_and_older_names_for_the_limit_and_models_without_a_temperature():
    def picky(request):
        if "max_tokens" in request.body:
            return Reply("Unsupported parameter: 'max_tokens'; use 'max_completion_tokens'", status=400)
        if "temperature" in request.body:
            return Reply("Unsupported value: 'temperature' does not support 0.0", status=400)
        return {"label": "cats"}

    with serve_llm(picky) as server:
        ask("openai", server)
        assert len(server.requests) == 3 and server.requests[-1].body["max_completion_tokens"] == 512


def test_ollama_is_always_asked_for_a_context_in_which_the_question_fits():
    with serve_llm(lambda request: {"label": "cats"}) as server:
        ask("ollama", server)
        ask("ollama", server, QUESTION._replace(user="猫" * 8000))  # a token each, or more
        ask("ollama", server, QUESTION._replace(user="word " * 10_000))
        contexts = [request.body["options"]["num_ctx"] for request in server.requests]
    assert contexts == [8192, 16_384, 32_768]


@BOTH
def test_no_more_are_under_way_than_may_be(protocol):
    async def ask_many(chat: PatientChat) -> None:
        await asyncio.gather(*(chat.ask(QUESTION) for _ in range(40)))

    with serve_llm(lambda request: {"label": "cats"}, latency=0.03) as server:
        began_at = time.monotonic()
        run(server_of(protocol, server), ask_many, n_parallel=5)
        assert server.peak == 5 and len(server.requests) == 40
        assert time.monotonic() - began_at >= 8 * 0.03


@BOTH
def test_who_waits_to_ask_again_holds_no_place(protocol):
    async def ask_two(chat: PatientChat) -> float:
        slow = asyncio.create_task(chat.ask(QUESTION))
        while not server.requests:
            await asyncio.sleep(0.01)
        began_at = time.monotonic()
        await chat.ask(QUESTION)
        took = time.monotonic() - began_at
        await slow
        return took

    first = Reply("wait", status=429, headers={"Retry-After": "1"})
    with serve_llm(script(first, {"label": "cats"})) as server:
        assert run(server_of(protocol, server), ask_two, n_parallel=1) < 0.9  # type: ignore[operator]


@BOTH
def test_usage_counts_every_request(protocol):
    async def ask_three(chat: PatientChat):
        for _ in range(3):
            await chat.ask(QUESTION)
        return chat.usage

    ok = Reply({"label": "cats"}, n_prompt_tokens=10, n_completion_tokens=2)
    with serve_llm(script(ok, Reply("no", status=500), ok), latency=0.02) as server:
        usage = run(server_of(protocol, server), ask_three)
    assert (usage.n_requests, usage.n_repeated, usage.n_answered) == (4, 1, 3)  # type: ignore[attr-defined]
    assert (usage.n_prompt_tokens, usage.n_completion_tokens) == (30, 6)  # type: ignore[attr-defined]
    assert 0.02 <= usage.seconds_per_request < 1  # type: ignore[attr-defined]


def test_what_a_server_says_of_the_key_is_taken_out():
    def hide(text: str) -> str:
        return text.replace(KEY, "[secret]")

    echo = f"you sent {KEY}"
    for reply in (
        Reply(echo, status=401),
        Reply(echo, status=400),
        Reply(echo, status=500),
        Reply(refusal=echo),
        Reply(echo, status=429, error_code="insufficient_quota"),
    ):
        with serve_llm(lambda request, reply=reply: reply) as server, pytest.raises(MistudioError) as failed:
            ask("openai", server, redact=hide, n_tries=1)
        assert KEY not in "".join(traceback.format_exception(failed.value)), "an error is logged with what led to it"
        assert "[secret]" in str(failed.value)
    with serve_llm(lambda request: {"label": echo}) as server:
        assert ask("openai", server, redact=hide).text == '{"label": "you sent [secret]"}'


@pytest.mark.parametrize(
    "address",
    [
        "ftp://127.0.0.1",
        "127.0.0.1:8000",
        "http://",
        "http://h/v1?key=x",
        "http://h/#x",
        "http://h:99999/",
        "",
        "//h/v1",
    ],
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(BadInput) as refused:
        check_address(address)
    assert refused.value.fix


@pytest.mark.parametrize(
    "address",
    [
        "https://me:hunter2@example.com/v1",
        "https://me:hunter2@example.com:99999/v1",
        "https://me:hunter2@[example.com/v1",
        "https:/me:hunter2@example.com/v1",
        "me:hunter2@example.com/v1",
        "https://example.com:99999/v1?key=hunter2",
    ],
)
def test_a_password_in_an_address_is_refused_and_not_repeated(address):
    with pytest.raises(BadInput) as refused:
        check_address(address)
    assert "hunter2" not in str(refused.value) and refused.value.fix


def test_offline_only_this_machine_is_asked():
    for address in ("http://127.0.0.1:1/v1", "http://localhost:1", "http://[::1]:1/v1", "http://127.9.9.9/v1"):
        assert is_loopback(address) and check_address(f"{address}/", offline=True) == address
    for address in (OPENAI_URL, "http://10.0.0.1/v1", "http://localhost.example.com", "http://127.0.0.1.example.com"):
        with pytest.raises(Unsupported, match="MISTUDIO_OFFLINE"):
            check_address(address, offline=True)


def test_openai_itself_wants_a_key_and_others_may_not():
    with pytest.raises(BadInput, match="no key for OpenAI"):
        needs_key(OPENAI_URL, None)
    needs_key(OPENAI_URL, KEY)
    for pasted in (f"“{KEY}”", f"{KEY[:9]}\n{KEY[9:]}"):
        with pytest.raises(BadInput, match="no key has") as refused:
            needs_key(OPENAI_URL, pasted)
        assert KEY not in str(refused.value)
    needs_key("http://127.0.0.1:1/v1", None)
