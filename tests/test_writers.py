"""Who writes: a server on this machine, and a tiny model."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from saesteer.core.writers import Cost, address_writer, local_writer
from saesteer.errors import ModelError
from tests.tiny import tiny_model, tiny_tokenizer


class Server(HTTPServer):
    """Answers each question with its last line in capitals; the first `busy` times with 503."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.busy, self.body, self.usage, self.seen = 0, None, None, []
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, self.headers.get("Authorization"), body))
            busy = self.server.busy > 0
            self.server.busy -= 1
        status = 503 if busy else 200 if body["model"] == "m" else 404
        text = body["messages"][0]["content"].upper()
        answer = {"choices": [{"message": {"content": text}}], "usage": self.server.usage}
        data = self.server.body or json.dumps(answer).encode()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_address_answers_in_order(server):
    write = address_writer(server.address, "m", key="secret", at_once=3)
    prompts = [f"question {i}" for i in range(12)]
    assert write(prompts) == [p.upper() for p in prompts]
    where, key, body = server.seen[0]
    assert where == "/v1/chat/completions" and key == "Bearer secret"
    assert body["temperature"] == 0 and body["messages"][0]["role"] == "user"
    whole = address_writer(f"{server.address}/chat/completions/", "m")
    assert whole(["a"]) == ["A"] and server.seen[-1][:2] == ("/v1/chat/completions", None)


def test_a_busy_server_is_asked_again(server):
    waited: list[float] = []
    server.busy = 2
    write = address_writer(server.address, "m", at_once=1, wait=waited.append)
    assert write(["a"]) == ["A"] and waited == [1.0, 2.0]
    server.busy = 99
    waited.clear()
    write = address_writer(server.address, "m", tries=3, wait=waited.append)
    with pytest.raises(ModelError, match="503"):
        write(["a"])
    assert waited == [1.0, 2.0]


def test_what_waiting_does_not_mend_is_told_at_once(server):
    waited: list[float] = []
    with pytest.raises(ModelError, match="404") as error:
        address_writer(server.address, "other", key="secret", wait=waited.append)(["a"])
    assert waited == [] and "secret" not in str(error.value)
    server.body = b"<html>"
    with pytest.raises(ModelError, match="OpenAI-compatible"):
        address_writer(server.address, "m")(["a"])
    for body in (b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}', b"[1]"):
        server.body = body
        with pytest.raises(ModelError, match="OpenAI-compatible"):
            address_writer(server.address, "m")(["a"])
    with pytest.raises(ModelError, match="no address"):
        address_writer("file:///etc/passwd", "m")


def test_nobody_there(server):
    address = server.address.replace(str(server.server_port), "9")
    waited: list[float] = []
    with pytest.raises(ModelError, match="gave no answer"):
        address_writer(address, "m", tries=2, wait=waited.append)(["a"])
    assert waited == [1.0]


def test_a_local_model_writes_the_same_alone_and_in_a_batch():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompts = ["the boy saw", "once upon a time there", "music"]
    write = local_writer(model, tokenizer, max_new_tokens=6, batch_size=2)
    together = write(prompts)
    assert together == [write([one])[0] for one in prompts]
    assert any(text.strip() for text in together)
    tokenizer.chat_template = "{% for m in messages %}king {{ m.content }} queen{% endfor %}"
    assert local_writer(model, tokenizer, max_new_tokens=6)(["the boy saw"]) == local_writer(
        model, tiny_tokenizer(bos=False), max_new_tokens=6
    )(["king the boy saw queen"])


def test_what_an_address_costs_is_counted(server):
    cost = Cost()
    write = address_writer(server.address, "m", cost=cost, temperature=0.5)
    server.usage = {"prompt_tokens": 7, "completion_tokens": 3}
    write(["a", "b"])
    assert (cost.calls, cost.tokens_in, cost.tokens_out, cost.uncounted) == (2, 14, 6, 0)
    assert server.seen[-1][2]["temperature"] == 0.5
    server.usage = {"prompt_tokens": 7}
    write(["c"])
    assert (cost.calls, cost.tokens_in, cost.tokens_out, cost.uncounted) == (3, 14, 6, 1)
    assert cost.seconds > 0


def test_what_a_local_model_costs_is_counted():
    cost = Cost()
    write = local_writer(tiny_model(), tiny_tokenizer(), max_new_tokens=5, cost=cost)
    write(["the boy saw", "music"])
    # BOS and three words, BOS and one.
    assert (cost.calls, cost.tokens_in, cost.uncounted) == (2, 6, 0)
    assert 2 <= cost.tokens_out <= 10 and cost.seconds > 0


def test_what_is_drawn_depends_on_the_seed_and_the_prompt_alone():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompts = ["the boy saw", "music", "the boy saw"]
    write = local_writer(model, tokenizer, max_new_tokens=8, temperature=1.0, batch_size=2)
    together = write(prompts)
    assert together == [write([one])[0] for one in prompts] and together[0] == together[2]
    other = local_writer(model, tokenizer, max_new_tokens=8, temperature=1.0, seed=1)
    assert other(prompts) != together
