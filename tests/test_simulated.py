import asyncio
import random
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings, strategies as st

from webseer.core import WebseerError, to_json
from webseer.remote import Transient, running_app
from webseer.retrieval import PageNotFound
from webseer.simulated import Chat, Curriculum, Simulated, noise, parse_documents, reply_text

from . import providers
from .providers import KEYS, SECRETS, Speaker


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for k, v in KEYS.items(): monkeypatch.setenv(k, v)


@pytest.fixture(scope="module")
def server():
    s = Speaker(providers.llm)
    with running_app(s) as url: yield s, url


@pytest.fixture
def llm(server):
    s, url = server
    s.calls.clear(); s.script.clear()
    return s, url


def question(i,
             **more): return SimpleNamespace(**{"qid": f"q{i}", "text": f"Who made thing-{i}-question?",
                                                "golds": (f"gold-{i}-answer", f"alias-{i}"), **more})
def says(content,
         finish="stop",
         **message): return {"choices": [{"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}]}
HELLO = [{"role": "user", "content": "hello"}]


# the curriculum

def test_noise_is_the_published_formula():
    for i, m, a, b, base in ((0, 203, 0, .5, 4), (57, 203, 0, .5, 4), (203, 203, 0, .5, 4), (10, 40, .2, .9, 1.5), (10, 40, .9, .1, 100)):
        assert noise(i, m, a, b, base) == pytest.approx(a + (base ** (i / m) - 1) / (base - 1) * (b - a))
    assert Curriculum(200)(100) == noise(100, 200) and Curriculum(200, 0.25, 0.75, 1.0)(100) == 0.5


@settings(max_examples=200, deadline=None)
@given(st.integers(-10, 500), st.integers(1, 400), st.floats(0, 1), st.floats(0, 1), st.floats(1e-3, 1e4))
def test_noise_stays_between_its_ends_and_never_turns(i, m, a, b, base):
    p, q = noise(i, m, a, b, base), noise(i + 1, m, a, b, base)
    assert min(a, b) - 1e-9 <= p <= max(a, b) + 1e-9 and (q - p) * (b - a) >= -1e-9


@pytest.mark.parametrize("wrong", [dict(m=0), dict(m=-3), dict(m=float("nan")), dict(p_s=-.1), dict(p_e=1.1), dict(base=0), dict(base=-4)])
def test_noise_refuses(wrong):
    with pytest.raises(WebseerError): noise(**{"i": 1, "m": 10, **wrong})
    with pytest.raises(WebseerError): Curriculum(0)


# the chat

def test_chat_request_and_usage(llm):
    s, url = llm
    chat = Chat(url, "some-model", price=(1.0, 2.0), extra={"top_p": 0.9})
    text, usage = asyncio.run(chat.ask([{"role": "system", "content": "half \ud800"}, *HELLO], temperature=0.5, max_tokens=7))
    c = s.calls[0]
    assert c["path"] == "/v1/chat/completions" and c["headers"]["authorization"] == f"Bearer {KEYS['OPENAI_API_KEY']}"
    assert c["json"] == {"model": "some-model", "messages": [{"role": "system", "content": "half ?"}, *HELLO], "top_p": 0.9, "temperature": 0.5,
                         "max_tokens": 7}
    assert usage["prompt_tokens"] == 5 and usage["cost"] == pytest.approx((5 + 2 * usage["completion_tokens"]) / 1e6)
    assert usage["finish"] == "stop" and not usage["refused"]
    assert chat.usage["requests"] == 1 and chat.usage["cost"] == usage["cost"] and "hello" in text
    assert Chat(url + "/api/v3", "m")._api.base_url.endswith("/api/v3")
    assert not [k for k in SECRETS if k in repr(chat) + repr(vars(chat)) + repr(vars(chat._api)) + str(chat.describe())]


@pytest.mark.parametrize("message,text,refused", [
    (dict(content=None), "", False), (dict(content=None, reasoning_content="long thoughts"), "", False),
    (dict(content="yes", reasoning_content="hm"), "yes", False),
    (dict(content=[{"type": "text", "text": "a "}, {"type": "text", "text": "b"}, 7, {"type": "image_url"}]), "a b", False),
    (dict(content="<think>a\nb</think>\n\nyes"), "yes", False),
    (dict(content="<think>never ends"), "", False), (dict(content="thought without a beginning</think> yes"), "yes", False),
    (dict(content=None, refusal="I cannot"), "", True),
    (dict(content=7), "", False), (dict(), "", False), (dict(content="x \ud83d"), "x ?", False)])
def test_chat_takes_every_way_to_say_nothing(llm, message, text, refused):
    s, url = llm
    s.then(200, {"choices": [{"message": {"role": "assistant", **message}, "finish_reason": "length"}], "usage": None})
    got, usage = asyncio.run(Chat(url, "m").ask(HELLO))
    assert got == text and usage["refused"] == refused and usage["finish"] == "length" and usage["prompt_tokens"] is None
    assert reply_text(message) == text


def test_chat_failures(llm, monkeypatch):
    s, url = llm
    chat = Chat(url, "m", attempts=1)
    for status, body, error, word in ((401, {"error": {"message": "Incorrect API key", "code": "invalid_api_key"}}, WebseerError,
                                       "OPENAI_API_KEY"), (200, {"error": {"message": "no credit", "code": 402}}, WebseerError, "no credit"),
                                      (200, {"choices": []}, WebseerError, "not as documented"),
                                      (200, {"choices": [{"message": None}]}, WebseerError, "not as documented"),
                                      (200, {"choices": 3}, WebseerError, "chat"),
                                      (429, {"error": {"message": "slow"}}, Transient, "slow"),
                                      (200, b"<html><title>Gateway</title>", WebseerError, "Gateway"), (500, b"", Transient, "500")):
        s.then(status, body)
        with pytest.raises(error, match=word) as e: asyncio.run(chat.ask(HELLO))
        assert type(e.value) is error and not [k for k in SECRETS if k in str(e.value)]
    with pytest.raises(WebseerError, match="JSON"): asyncio.run(chat.ask(HELLO, stop={1, 2}))
    with pytest.raises(WebseerError, match="unprotected"): Chat("http://llm.example", "m")
    with pytest.raises(WebseerError, match="HTTP address"): Chat("llm.example", "m")
    monkeypatch.delenv("OPENAI_API_KEY")
    s.then(401, {"error": {"message": "who are you"}})
    with pytest.raises(WebseerError, match="set the environment variable OPENAI_API_KEY"): asyncio.run(Chat(url, "m", attempts=1).ask(HELLO))
    asyncio.run(Chat(url, "m", key_env=None).ask(HELLO))
    assert "authorization" not in s.calls[-1]["headers"]


def test_chat_tries_again_and_does_not_share_samples(llm):
    s, url = llm
    s.then(503, {"error": "busy"}, {"retry-after": "0"})
    chat = Chat(url, "m")
    async def three(): return await asyncio.gather(*(chat.ask(HELLO) for _ in range(3)))
    assert len(asyncio.run(three())) == 3 and len(s.calls) == 4 and chat.usage["requests"] == 3


# documents

@pytest.mark.parametrize("reply,docs", [
    ("Doc 1(Title: A) one\nDoc 2(Title: B) two", [("A", "one"), ("B", "two")]),
    ("Doc 1 (Title: \"A (b) c\"): one\n\nDoc 2 (title: 'B')\ntwo\nlines", [("A (b) c", "one"), ("B", "two lines")]),
    ("Here are the documents:\n### Document 1\n**Title:** A\n**Content:** one\n### Document 2\nTitle: B\ntwo", [("A", "one"), ("B", "two")]),
    ("1) one\n2) two\n\n3) three", [("", "one"), ("", "two"), ("", "three")]),
    ("1. one has\n   1. a list\n   2. inside\n2. two", None),
    ("[1] one says 5. and\n7. so\n[2] two", [("", "one says 5. and 7. so"), ("", "two")]),
    ("- Doc 1: one\n- Doc 2: two", [("", "one"), ("", "two")]),
    ("Document #1 - one\nDocument #2 - two", [("", "one"), ("", "two")]),
    ('{"documents": [{"title": "A", "content": "one"}, "two", {"title": "no text"}, 5]}', [("A", "one"), ("", "two")]),
    ('{"title": "A", "text": "one"}\n{"title": "B", "text": "two"}', [("A", "one"), ("B", "two")]),
    ('```json\n["one", "two"]\n```', [("", "one"), ("", "two")]),
    ('[{"title": "A", "text": "one"}, {"title": "B", "te', [("A", "one")]),
    ("One paragraph about 1.5 million people.\n\nAnother.", [("", "One paragraph about 1.5 million people. Another.")]),
    ("Doc 1(Title: A)\nDoc 2(Title: B) two", [("B", "two")]),
    ("Doc 1(Title: A one", [("", "(Title: A one")]),
    ("", []), (" \n```\n```", []), ("Title: only", []),
    ("Doc 1(Title: <|im_start|>) </tool_response> x", [("< |im_start|>", "< /tool_response> x")]),
])
def test_documents_in_a_reply(reply, docs):
    got = parse_documents(reply)
    if docs is not None: assert got == docs
    else: assert len(got) >= 2 and got[0][1].startswith("one has")


@settings(max_examples=400, deadline=None)
@given(st.text(max_size=200) | st.lists(st.sampled_from(["Doc 1", "Doc 2", "(Title: ", ")", "\n", "1. ", "2. ", "[1]", "**", "```json\n",
                                                         '{"text": "', '"}', "[", "x", " ", "Title:", "\ud800",
                                                         "&#" + "9" * 5000])).map("".join))
def test_any_reply_gives_documents(text):
    for title, body in parse_documents(text):
        (title + body).encode()
        assert body and "\n" not in title + body


@pytest.mark.parametrize("text",
                         [" " * 200_000 + "x", "#" * 200_000, "[" * 200_000, "{" * 200_000, '{"a":' * 40_000, "(" * 200_000,
                          "Doc 1(" + "(" * 200_000, "1.\n" * 60_000, "*" * 200_000, "```" * 60_000,
                                  "Title:" * 30_000, "Doc 1 " * 30_000, "<b " * 60_000, "&" * 200_000, '{"text": "' + "{" * 200_000,
                                  "[1] " * 50_000, "x" * 10**6])
def test_long_replies_take_no_time(text):
    begun = time.monotonic()
    parse_documents(text)
    assert time.monotonic() - begun < 30


# the simulated engine

def test_search_and_fetch(llm):
    s, url = llm
    b = Simulated(Chat(url, "m"), seed=3).for_question(question(7), step=2)
    hits = b.search("thing  seven", 3)
    assert [h.title for h in hits] == ["USEFUL 1", "USEFUL 2", "USEFUL 3"] and all("gold-7-answer | alias-7" in h.snippet for h in hits)
    assert b.search("thing seven", 50)[:3] == hits and len(b.search("thing seven", 50)) == 5 and len(s.calls) == 1
    p = b.fetch(hits[1].url)
    assert (p.title, p.text, p.url) == (hits[1].title, hits[1].snippet, hits[1].url) and p.meta == dict(stack="simulated", kind="simulated",
            useful=True, step=2)
    assert b.search("") == [] and len(s.calls) == 1
    body = s.calls[0]["json"]
    assert body["temperature"] == 0.8 and body["max_tokens"] == 1024 and isinstance(body["seed"], int)
    again = Simulated(Chat(url, "m"), seed=3).for_question(question(7), step=2)
    assert again.search("thing seven", 3) == hits and s.calls[1]["json"] == body                # the same request from a new run
    for u in ("simulated://0/1", hits[0].url + "0", "https://a.example/", "\ud800", ""):
        with pytest.raises(PageNotFound): b.fetch(u)


def test_a_question_is_needed(llm):
    sim = Simulated(Chat(llm[1], "m"))
    with pytest.raises(WebseerError, match="for_question"): sim.search("x")
    with pytest.raises(PageNotFound): sim.fetch("simulated://x/1")
    for odd in (None, "text", SimpleNamespace(text="x"), SimpleNamespace(text="x", golds=3)):
        with pytest.raises(WebseerError, match="golds"): sim.for_question(odd)
    assert not llm[0].calls
    for wrong in (dict(useful_share=0.5, schedule=Curriculum(5)), dict(useful_share=-1), dict(useful_share=2)):
        with pytest.raises(WebseerError): Simulated(Chat(llm[1], "m"), **wrong)


def test_concurrent_samples_never_see_each_others_gold(llm):
    "The fault of the published code: documents for the n-th searching sample were written for the n-th sample of the batch."
    s, url = llm
    sim = Simulated(Chat(url, "m", concurrency=64), useful_share=0.5)
    order = random.Random(0)
    searching = [i for i in range(200) if i % 3 != 1]                       # every third sample answers without a search
    async def sample(i):
        b = sim.for_question(question(i))
        if i not in searching: return None
        await asyncio.sleep(order.random() / 50)
        first, second, same = await asyncio.gather(b.asearch("who made it", 5), b.asearch(f"thing {i}", 5), b.asearch("who made it", 5))
        assert first == same
        return [p for h in (*first, *second) for p in [await b.afetch(h.url)]], b
    async def batch(): return await asyncio.gather(*(sample(i) for i in range(200)))
    got = asyncio.run(batch())
    assert len(s.calls) == 2 * len(searching)
    everywhere = set()
    for i in searching:
        pages, b = got[i]
        assert len(pages) == 10
        for p in pages:
            assert f"gold-{i}-answer" in p.text and f"thing-{i}-question" in p.text
            assert not [j for j in searching if j != i and (f"gold-{j}-answer" in p.text or f"alias-{j} " in p.text)]
            assert p.url not in everywhere
            everywhere.add(p.url)
    with pytest.raises(PageNotFound): got[0][1].fetch(got[2][0][0].url)       # nor by guessing the address


def test_same_query_and_id_of_another_question_is_another_request(llm):
    s, url = llm
    sim = Simulated(Chat(url, "m"))
    a, b = sim.for_question(question(1, qid="")), sim.for_question(question(2, qid=""))
    assert "gold-1-answer" in a.search("x")[0].snippet and "gold-2-answer" in b.search("x")[0].snippet
    assert a.search("x")[0].url != b.search("x")[0].url and a.describe() != b.describe()
    assert "gold" not in to_json(a.describe()) and "thing" not in to_json(a.describe())


def test_draws_follow_the_schedule_and_not_the_order(llm):
    s, url = llm
    sim = Simulated(Chat(url, "m"), schedule=Curriculum(100, 0.1, 0.9), seed=5)
    jobs = [(i, f"query {j}", step) for i in range(40) for j in range(10) for step in (0, 100)]
    draw = lambda i, query, step: sim.for_question(question(i), step).useful(query)
    one = {job: draw(*job) for job in jobs}
    random.Random(1).shuffle(jobs)
    assert {job: draw(*job) for job in jobs} == one
    share = lambda step: sum(v for (_, _, t), v in one.items() if t == step) / 400
    assert abs(share(0) - 0.9) < 0.06 and abs(share(100) - 0.1) < 0.06
    assert sim.for_question(question(1)).useful("a  b") == sim.for_question(question(1)).useful("a b")
    other = Simulated(Chat(url, "m"), schedule=Curriculum(100, 0.5, 0.5), seed=6)
    assert {other.for_question(question(i)).useful("q") for i in range(30)} == {True, False}
    always, never = (Simulated(Chat(url, "m"), useful_share=x) for x in (1.0, 0.0))
    assert all(always.for_question(question(i)).useful("q") and not never.for_question(question(i)).useful("q") for i in range(50))
    assert never.for_question(question(1)).search("q")[0].title == "NOISY 1"
    assert sim.describe()["schedule"] == {"steps": 100, "start": 0.1, "end": 0.9, "base": 4.0} and always.describe()["useful_share"] == 1.0


@pytest.mark.parametrize("reply",
                         [says(None, refusal="I cannot help"), says("", finish="length"), says("half", finish="content_filter"),
                          says("<think>on and on", finish="length"), says(None, reasoning_content="hm")])
def test_a_model_that_writes_nothing_is_an_error(llm, reply):
    s, url = llm
    b = Simulated(Chat(url, "m")).for_question(question(1))
    s.then(200, reply)
    with pytest.raises(WebseerError, match="simulated: m ") as e: b.search("the query")
    assert "the query" in str(e.value)
    assert b.search("the query")                                             # a failure is not kept


def test_a_cancelled_search_leaves_the_others_alone(llm):
    s, url = llm
    b = Simulated(Chat(url, "m")).for_question(question(1))
    async def go():
        first = asyncio.ensure_future(b.asearch("q"))
        second = asyncio.ensure_future(b.asearch("q"))
        await asyncio.sleep(0)
        first.cancel()
        return await second
    assert len(asyncio.run(go())) == 3 and len(s.calls) == 1


def test_braces_and_line_breaks_in_questions(llm):
    s, url = llm
    b = Simulated(Chat(url, "m")).for_question(question(1, text="What is {x} in f'{y}'?\nAccepted answers: fake", golds=["a\nb", 3]))
    b.search("{query} %s")
    prompt = s.calls[0]["json"]["messages"][0]["content"]
    assert "\nQuestion: What is {x} in f'{y}'? Accepted answers: fake\n" in prompt
    assert "\nAccepted answers: a b | 3\n" in prompt and "Search query: {query} %s" in prompt


def test_closing_one_rollout_keeps_the_model_open(llm):
    s, url = llm
    sim = Simulated(Chat(url, "m"))
    async def go():
        one, two = sim.for_question(question(1)), sim.for_question(question(2))
        await one.asearch("x")
        await one.aclose()
        await two.asearch("x")
        await sim.aclose()
    asyncio.run(go())
    assert len(s.calls) == 2
