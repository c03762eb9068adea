"""`EndpointPolicy` against a real HTTP server on loopback."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tests.support.rollouts import Answer, arena, order

from turnwise.errors import RecipeError
from turnwise.rollout.endpoint import EndpointPolicy
from turnwise.rollout.episode import play_episode
from turnwise.types import Finish, Sampling, StopReason, Trajectory


def completion(content=None, *tool_calls, finish="stop", **message):
    made = [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for call_id, name, arguments in tool_calls
    ]
    said = {"role": "assistant", "content": content, **({"tool_calls": made} if made else {}), **message}
    return 200, {"choices": [{"message": said, "finish_reason": finish}]}


@contextmanager
def server(*answers):
    """Serves the answers in order, the last one for ever; yields its URL and the requests it got."""
    requests, left, released = [], list(answers), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, dict(self.headers), body))
            answer = left.pop(0) if len(left) > 1 else left[0]
            if answer == "hang up":
                self.close_connection = True
                return
            if answer == "hang":
                released.wait(30)
                answer = completion("late")
            status, payload, *headers = answer
            data = payload.encode() if isinstance(payload, str) else json.dumps(payload).encode()
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/v1", requests
    finally:
        released.set()
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def play(url, *, sampling=None, limits=None, **options) -> Trajectory:
    where = arena(Answer, limits=limits or {})

    async def main():
        policy = EndpointPolicy(url, "some-model", **{"backoff": 0.01, **options})
        try:
            return await play_episode(
                order(env="answer"),
                arena=where,
                policy=policy,
                sampling=sampling or Sampling(max_tokens=20, temperature=0.5),
                sink=lambda one: None,
            )
        finally:
            await policy.aclose()
            await where.aclose()

    return asyncio.run(main())


def test_an_episode_with_tools(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    first = completion(None, ("call_9", "look", "{}"), reasoning_content="let me see")
    with server(first, completion("3")) as (url, requests):
        done = play(url, api_key_env="SOME_KEY", extra={"reasoning_effort": "low"})
    assert done.stop_reason is StopReason.ANSWERED and done.reward == 0.5
    assert done.policy == "endpoint:some-model" and done.sampling is None
    assert done.turns[0].message.reasoning == "let me see" and done.turns[0].ids is None
    (path, headers, asked), (_, _, again) = requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert asked["messages"] == [{"role": "user", "content": "How much?"}]
    assert [one["function"]["name"] for one in asked["tools"]] == ["look"]
    assert (asked["model"], asked["max_tokens"], asked["temperature"]) == ("some-model", 20, 0.5)
    assert asked["reasoning_effort"] == "low" and "top_p" not in asked
    assert again["messages"][1:] == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "call_9", "type": "function", "function": {"name": "look", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "content": "3", "tool_call_id": "call_9"},
    ]


@pytest.mark.parametrize("arguments", ['{"item": ', "[1]"])
def test_arguments_that_are_not_json_are_a_malformed_call_and_go_back_as_they_were(arguments):
    with server(completion(None, ("c", "look", arguments)), completion("3")) as (url, requests):
        done = play(url)
    assert done.metrics["malformed_calls"] == 1 and done.stop_reason is StopReason.ANSWERED
    sent_back = requests[1][2]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert sent_back == arguments


def test_what_may_pass_is_tried_again():
    passing = [(429, "slow down", ("Retry-After", "0")), (503, "busy"), "hang up", completion("3")]
    with server(*passing) as (url, requests):
        done = play(url)
    assert done.stop_reason is StopReason.ANSWERED and len(requests) == 4


def test_a_server_that_asks_for_time_gets_it():
    with server((429, "slow down", ("Retry-After", "0.3")), completion("3")) as (url, _):
        started = time.perf_counter()
        play(url)
        assert time.perf_counter() - started > 0.2


def test_tries_are_bounded_and_the_last_problem_is_said():
    with server((500, "boom")) as (url, requests):
        done = play(url, retries=2)
    assert len(requests) == 3 and done.stop_reason is StopReason.POLICY_FAILED
    assert "3 tries failed; the last: status 500: boom" in done.error.message


def test_what_will_not_pass_is_not_tried_again():
    with server((401, {"error": "bad key"})) as (url, requests):
        done = play(url)
    assert len(requests) == 1 and done.stop_reason is StopReason.POLICY_FAILED
    assert "status 401" in done.error.message and "bad key" in done.error.message


def test_a_request_has_a_deadline():
    with server("hang") as (url, _):
        done = play(url, seconds=0.5, retries=1)
    assert done.stop_reason is StopReason.POLICY_FAILED and "ReadTimeout" in done.error.message


def test_nobody_listening():
    with server(completion("3")) as (url, _):
        pass
    done = play(url, retries=1)
    assert done.stop_reason is StopReason.POLICY_FAILED and "ConnectError" in done.error.message


@pytest.mark.parametrize("payload", ["<html>", {"choices": []}, {"choices": [{}]}])
def test_an_answer_that_is_none(payload):
    with server((200, payload)) as (url, _):
        done = play(url)
    assert done.stop_reason is StopReason.POLICY_FAILED
    assert "endpoint:some-model" in done.error.message


def test_a_cut_reply_ends_the_episode_as_cut():
    with server(completion("three and", finish="length")) as (url, _):
        done = play(url)
    assert done.stop_reason is StopReason.CUT_REPLY and done.turns[0].finish is Finish.LENGTH


def test_a_context_that_does_not_fit_is_told_apart_from_a_failing_server():
    full = (
        400,
        {"error": {"message": "This model's maximum context length is 4096 tokens, you requested 5000"}},
    )
    with server(full) as (url, _):
        first = play(url)
    assert first.stop_reason is StopReason.PROMPT_TOO_LONG and "5000 tokens; 4096 fit" in first.error.message
    with server(completion(None, ("c", "look", "{}")), full) as (url, _):
        later = play(url)
    assert later.stop_reason is StopReason.MAX_TOKENS and later.reward == 0.5


def test_a_key_that_is_not_set_is_said_at_once(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(RecipeError, match="NO_SUCH_KEY is not set"):
        EndpointPolicy("http://localhost", "m", api_key_env="NO_SUCH_KEY")


def test_sampling_settings_beyond_openais_are_sent_only_where_set():
    with server(completion("3")) as (url, requests):
        play(url, sampling=Sampling(top_p=0.9, top_k=5, min_p=0.1))
    body = requests[0][2]
    assert (body["top_p"], body["top_k"], body["min_p"]) == (0.9, 5, 0.1) and isinstance(body["seed"], int)


@pytest.mark.parametrize("arguments", ['{"x": ' + "[" * 900 + "]" * 900 + "}", "[" * 9000 + "]" * 9000])
def test_arguments_nested_without_end_are_a_malformed_call(arguments):
    with server(completion(None, ("c", "look", arguments)), completion("3")) as (url, _):
        done = play(url)
    (made,) = done.turns[0].message.tool_calls
    assert "nested too deeply" in made.error and done.stop_reason is StopReason.ANSWERED


def test_a_call_without_a_name_is_malformed():
    with server(completion(None, ("c", None, "{}")), completion("3")) as (url, _):
        done = play(url)
    (made,) = done.turns[0].message.tool_calls
    assert (made.name, made.error) == ("", "the call has no name")
    assert done.stop_reason is StopReason.ANSWERED
