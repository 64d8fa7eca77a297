"""The OpenAI server: the same answers over HTTP, many at once, and a reason for each bad request."""

import base64
import io
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image


pytest.importorskip("vllm")

from engines import MAX_TOKENS, RECEIPT, ROOT, Request, Transformers, draw_requests  # noqa: E402


pytestmark = pytest.mark.vllm
SALAD = Request("how much is the salad?", (Image.open(RECEIPT).convert("RGB"),))


def image_part(image: Image.Image | bytes | str) -> dict:
    """A picture, the bytes of a file, or a URL, as a part of a message."""
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        image.save(file, "PNG")
        image = file.getvalue()
    url = image if isinstance(image, str) else f"data:image/png;base64,{base64.b64encode(image).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def chat(*parts: dict | str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A server of the root checkpoint."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [ROOT / "examples" / "serve.sh", ROOT, "--dtype", "float32", "--block-size", "32", "--port", str(port)]
    command += ["--enforce-eager", "--host", "127.0.0.1"]
    env = {**os.environ, "PYTHON": sys.executable, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as file, subprocess.Popen([*map(str, command)], env=env, stdout=file, stderr=file) as server:
        try:
            for _ in range(300):
                if "Application startup complete" in log.read_text():
                    break
                assert server.poll() is None, log.read_text()[-5000:]
                time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def client(url):
    import openai

    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)


@pytest.fixture(scope="module")
def ask(client):
    """`ask(request)`: the answer's text and the number of tokens of the prompt."""
    model = client.models.list().data[0].id

    def ask(request: Request, **options):
        options = {"max_tokens": MAX_TOKENS, "temperature": 0, **options}
        if request.downsample is not None:
            options["extra_body"] = {"mm_processor_kwargs": {"projector_downsample": request.downsample}}
        messages = chat(*map(image_part, request.images), request.question)
        response = client.chat.completions.create(model=model, messages=messages, **options)
        return response.choices[0].message.content, response.usage.prompt_tokens

    return ask


@pytest.fixture(scope="module")
def expected():
    """The requests, each with s in turns, and what transformers answers."""
    reference, requests = Transformers(ROOT), draw_requests()
    asked = [*requests, *(Request(SALAD.question, SALAD.images, s) for s in (2, 3, 4))]
    answers = [reference.answer(request) for request in asked]
    texts = reference.processor.batch_decode([answer.tokens for answer in answers], skip_special_tokens=True)
    return [(request, (text, answer.prompt_tokens)) for request, text, answer in zip(asked, texts, answers)]


def test_answers_and_prompt_tokens_are_those_of_transformers(ask, expected):
    found = [ask(request) for request, _ in expected]
    assert found == [answer for _, answer in expected]


def test_sixty_four_at_once(ask, expected):
    work = (expected * 2)[:64]
    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(lambda case: ask(case[0]), work)) == [answer for _, answer in work]


BROKEN = b"\x89PNG\r\n\x1a\n" + bytes(50)
GOOD = image_part(SALAD.images[0])
ENDLESS = "how much is the salad? " * 400
BAD = {  # messages, options, and a part of the reason
    "empty data URI": (chat(image_part(b""), "what?"), {}, "image"),
    "broken picture": (chat(image_part(BROKEN), "what?"), {}, "image"),
    "text as a picture": (chat(image_part(b"hello"), "what?"), {}, "image"),
    "broken base64": (chat(image_part("data:image/png;base64,@@@"), "what?"), {}, ""),
    "no such host": (chat(image_part("http://127.0.0.1:9/x.png"), "what?"), {}, ""),
    "local file": (chat(image_part(f"file://{RECEIPT}"), "what?"), {}, "local"),
    "no scheme": (chat(image_part("receipt.png"), "what?"), {}, ""),
    "image_url without a url": (chat({"type": "image_url", "image_url": {}}, "what?"), {}, ""),
    "image_url null": (chat({"type": "image_url", "image_url": None}, "what?"), {}, ""),
    "unknown part": (chat({"type": "picture", "picture": "x"}, "what?"), {}, ""),
    "a video": (chat({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}), {}, "video"),
    "an audio": (chat({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}), {}, "audio"),
    "fifty images": (chat(*[GOOD] * 50, "what?"), {}, "of its 50 images"),
    "placeholder in a text": (chat(GOOD, "what is <image> here?"), {}, "2 <image> but 1 images"),
    "placeholder without an image": (chat("<image> what?"), {}, "1 <image> but 0 images"),
    "placeholder in another turn": (
        [*chat(GOOD, "what?"), {"role": "assistant", "content": "<image>"}, *chat("why?")],
        {},
        "2 <image> but 1 images",
    ),
    "placeholder of the system": ([{"role": "system", "content": "<image>"}, *chat(GOOD, "a?")], {}, "2 <image> but 1"),
    "too long a text": (chat(GOOD, ENDLESS), {}, "512"),
    "too many new tokens": (chat(GOOD, "what?"), {"max_tokens": 5000}, "512"),
    "s that is no choice": (chat(GOOD, "what?"), {"s": 5}, r"must be one of [2, 3, 4]"),
    "s = 0": (chat(GOOD, "what?"), {"s": 0}, "must be one of [2, 3, 4]"),
    "s as a text": (chat(GOOD, "what?"), {"s": "2"}, "must be one of [2, 3, 4]"),
    "s = 2.5": (chat(GOOD, "what?"), {"s": 2.5}, "must be one of [2, 3, 4]"),
    "s = true": (chat(GOOD, "what?"), {"s": True}, "must be one of [2, 3, 4]"),
    "a list of s": (chat(GOOD, "what?"), {"s": [2]}, "one number for all images"),
    "another processor option": (
        chat(GOOD, "what?"),
        {"mm_processor_kwargs": {"size": 9}},
        "takes projector_downsample",
    ),
    "no messages": ([], {}, ""),
    "temperature below zero": (chat(GOOD, "what?"), {"temperature": -1}, "temperature"),
    "an embedding as an image": (chat({"type": "image_embeds", "image_embeds": "AAAA"}, "what?"), {}, ""),
    "a bomb": (chat(image_part(Image.new("1", (30000, 30000))), "what?"), {}, "pixels"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_request_gets_a_reason_and_the_next_is_answered(url, client, ask, case):
    import httpx

    messages, options, reason = BAD[case]
    options = dict(options)
    if "s" in options:
        options["mm_processor_kwargs"] = {"projector_downsample": options.pop("s")}
    body = {"model": client.models.list().data[0].id, "messages": messages, "max_tokens": 8, **options}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    assert 400 <= response.status_code < 500, response.text
    message = response.json()["error"]["message"]
    assert message and reason in message
    assert ask(SALAD)[0] == "89"


def test_picture_of_a_refused_request_is_read_in_the_next(client, ask):
    import openai

    picture = SALAD.images[0].resize((90, 90))
    with pytest.raises(openai.BadRequestError, match="of its 40 images"):
        ask(Request("what?", (picture,) * 40))
    assert ask(Request("what?", (picture,)))[0]


def test_clients_that_hang_up(url, client, ask):
    """Twenty connections are cut while their answers are made."""
    import httpx

    model, before = client.models.list().data[0].id, ask(SALAD)

    def hang_up(i: int):
        messages = chat(GOOD, f"Transcribe the image. {i}")
        body = {"model": model, "messages": messages, "max_tokens": 200, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
            next(response.iter_lines())

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(hang_up, range(20)))
    assert ask(SALAD) == before
