"""The page of trajectories: what it is made of, and what it does in a real browser (headless Chromium)."""
import base64
import gzip
import json
import math
import os
import random
import re
import shutil
import threading
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from webseer import released
from webseer.core import WebseerError
from webseer.rewards import score_answer
from webseer.traj import Traj, save_trajs
from webseer.viewer import body, index_row, question_keys, read_run, view

EVIL = "</script><script>alert('page')</script><!-- <img src=x onerror=alert(1)> ]]> \u2028 & <b>bold</b>"


def call(i, name, **args):
    return dict(id=str(i), type="function", function=dict(name=name, arguments=json.dumps(args)))


def traj(q, gold, answers, result="A page.", steps=2, qid="", thought="I look.", **more):
    "A trajectory of `steps` searches and some submissions."
    m, names = [dict(role="system", content="Look things up."), dict(role="user", content=q)], []
    for k in range(steps):
        m += [dict(role="assistant", content=thought, tool_calls=[call(k, "search", query=f"step {k} {q}")]), dict(role="tool", tool_call_id=str(k), name="search", content=result)]
        names.append("search")
    for k, a in enumerate(answers, steps):
        m += [dict(role="assistant", content="", tool_calls=[call(k, "submit_answer", answer=a)]), dict(role="tool", tool_call_id=str(k), name="submit_answer", content="noted")]
        names.append("submit_answer")
    more = dict(stop="submitted" if answers else "max_calls", turns=[dict(seconds=0.5, prompt_tokens=100, completion_tokens=20) for _ in range(steps + len(answers))]) | more
    return Traj(q, [gold], qid, messages=m, submissions=[dict(answer=a, **score_answer(a, gold)) for a in answers], calls=names, **more)


def runs(folder):
    "Two runs over the same questions; the second is better, and one of its pages is hostile."
    one = [traj("Who is the mayor of Brimmere?", "Alda Marn", ["Marn"], qid="a", faults=dict(no_call=2)),
           traj("Where does the Osk end?", "Tarn", [], qid="b", steps=5), traj("When was it built?", "1912", ["1911", "1912"], qid="c", reward=0.64, parts=dict(score=1.0, decay=0.64))]
    spliced = "Let me verify this. I read on."
    two = [traj("Who is the mayor of Brimmere?", "Alda Marn", ["Alda Marn"], qid="a", steps=3), traj("Where does the Osk end?", "Tarn", ["Tarn"], qid="b", result=EVIL, thought=EVIL),
           traj("When was it built?", "1912", ["1912"], qid="c", thought=spliced, spliced=[[2, 0, 20]], faults=dict(empty_reply=1))]
    two[0].turns[1]["drift"] = True
    two[0].messages.insert(4, dict(role="user", content="No tool was called. Call one tool."))
    paths = [folder/"first.jsonl", folder/"second.jsonl"]
    for p, ts in zip(paths, (one, two)): save_trajs(p, ts)
    return paths


def unpack(page):
    "Index and bodies of a page."
    def no(name): raise AssertionError(f"{name} is no JSON: a browser would refuse the page")
    index = json.loads(re.search(r'<script type="application/json" id="index">(.*?)</script>', page, re.S)[1], parse_constant=no)
    packed = dict(re.findall(r'<script type="application/octet-stream" id="(\w+)">([^<]*)</script>', page))
    blocks = {k: json.loads(gzip.decompress(base64.b64decode(v)), parse_constant=no) for k, v in packed.items()}
    return index, [b for k in range(len(index["starts"])) for b in blocks[f"block{k}"]], blocks


# ---- Without a browser ----

def test_what_goes_in_comes_out(tmp_path):
    paths = runs(tmp_path)
    page = view(paths, tmp_path/"page.html").read_text()
    index, bodies, _ = unpack(page)
    rows = [dict(zip(index["fields"], r)) for r in index["rows"]]
    want = [s for p in paths for s in read_run(p)]
    assert len(rows) == len(bodies) == 6 and [r["name"] for r in index["runs"]] == ["first", "second"]
    for s, row, b in zip(want, rows, bodies):
        assert json.loads(json.dumps(body(s))) == b
        assert {k: row[k] for k in index_row(s)} == json.loads(json.dumps(index_row(s)))
        assert "".join(e["text"] for e in b["events"] if e["message"] > 1 and e["source"] in ("model", "spliced")) == "".join(m["content"] for m in s.traj.messages if m["role"] == "assistant")
    assert [r["right"] for r in rows] == [0, 0, 1, 1, 1, 1] and [r["q"] for r in rows] == ["a", "b", "c"] * 2
    assert rows[3]["faults"] == {"drift": 1} and rows[0]["faultcount"] == 2
    assert view(paths, tmp_path/"again.html").read_bytes() == page.encode()


def test_hostile_text_never_stands_in_the_page_as_it_is(tmp_path):
    evil = traj(EVIL, EVIL, [EVIL], result=EVIL, qid="<!--", stop="<script>", faults={"<script>alert(2)</script>": 1}, meta={"</script>": EVIL})
    save_trajs(tmp_path/"a.jsonl", [evil])
    page = view(tmp_path/"a.jsonl", tmp_path/"page.html", title="</title>" + EVIL).read_text()
    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs): found.append((tag, dict(attrs)))
        def handle_comment(self, data): found.append(("comment", data))
    Reader().feed(page)
    tags = [tag for tag, _ in found]
    assert [a.get("type") for tag, a in found if tag == "script"] == ["application/json", None, "application/octet-stream"]       # ours, in this order
    assert not {"img", "b", "comment", "link", "iframe"} & set(tags) and all(a.get("href", "#") == "#" and "src" not in a for _, a in found if isinstance(a, dict))
    assert not any(k.startswith("on") for tag, a in found if isinstance(a, dict) for k in a)
    index, bodies, _ = unpack(page)
    assert index["title"] == "</title>" + EVIL and index["rows"][0][0] == EVIL and any(e["text"] == EVIL for e in bodies[0]["events"])
    assert not re.search(r"https?://|@import|url\(", page)


@pytest.mark.parametrize("line", ['{"a": ', "null", "[]", '"text"', '{"schema": "webseer.traj/0"}', '{"schema": "webseer.traj/1", "question": "q"}', b"\xff\xfe\xfd".decode("latin1"),
    *(json.dumps(dict(schema="webseer.traj/1", question="q", golds=[]) | d) for d in (
        dict(messages="x"), dict(messages=[{}]), dict(messages=[dict(role="user", content=[1])]), dict(messages=[dict(role="assistant", content="", tool_calls=[{}])]), dict(question=5),
        dict(ids=[1], mask=[]), dict(ids=[1], mask=[2]), dict(ids=["x"], mask=[1]), dict(spliced=[[0]]), dict(submissions=[3]), dict(turns=[3]), dict(faults=[]), dict(stop=None), dict(other=1), dict(reward="x"), dict(reward=10**400)))])
def test_a_malformed_line_is_one_sentence_with_its_number(tmp_path, line):
    save_trajs(p := tmp_path/"run.jsonl", [traj("q", "g", ["g"])])
    with open(p, "ab") as f: f.write(b"\n" + line.encode("latin1") + b"\n")
    before = (tmp_path/"page.html"); before.write_text("as it was")
    with pytest.raises(WebseerError) as e: view(p, before)
    assert f"{p}, line 3: " in str(e.value) and "\n" not in str(e.value) and before.read_text() == "as it was"


def test_wrong_files_are_named(tmp_path):
    save_trajs(p := tmp_path/"run.jsonl", [traj("q", "g", ["g"])])
    (tmp_path/"empty.jsonl").write_text("\n")
    (tmp_path/"cut.json").write_text('[{"messages": [')
    for paths, out, words in (([], "x.html", "no run file"), (tmp_path/"none.jsonl", "x.html", "none.jsonl does not exist"), (tmp_path, "x.html", "is a folder"), (tmp_path/"empty.jsonl", "x.html", "is empty"),
                              ([p, p], "x.html", "given twice"), (p, "run.jsonl", "is a run file"), (tmp_path/"cut.json", "x.html", "cut.json: cut off in rollout 0")):
        with pytest.raises(WebseerError, match=re.escape(words)): view(paths, tmp_path/out)
    with pytest.raises(WebseerError, match="no tokenizer.json"): view(p, tmp_path/"x.html", tokenizer=tmp_path)
    assert list(read_run(p)) and not (tmp_path/"x.html").exists()


JSON = st.recursive(st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=5), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3), max_leaves=8)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from([*Traj.__dataclass_fields__]), value=JSON, deep=st.booleans())
def test_any_value_in_any_field_is_shown_or_refused(tmp_path, field, value, deep):
    d = traj("q", "g", ["g"], ids=[1, 2], mask=[0, 1], logprobs=[0.0, -1.0]).to_dict()
    if deep and isinstance(d[field], list) and d[field] and isinstance(d[field][-1], dict): d[field][-1][random.Random(repr(value)).choice([*d[field][-1]])] = value
    else: d[field] = value
    (p := tmp_path/"run.jsonl").write_text(json.dumps(d) + "\n")
    try: unpack(view(p, tmp_path/"page.html").read_text())
    except WebseerError as e: assert "line 1" in str(e) and "\n" not in str(e)


def test_questions_match_by_identifier_else_by_text():
    assert question_keys([[(None, "7", "Who?")], [(None, "7", "Who?")]])[0] == question_keys([[(None, "7", "Who?")], [(None, "7", "Who?")]])[1]
    (a,), (b,) = question_keys([[(1, "0", "Who?")], [(2, "0", "Where?")]])
    assert a != b
    (a,), (b,) = question_keys([[(None, "", "Who is it?")], [(None, "", "who is  it")]])
    assert a == b
    (a, b), = question_keys([[(None, "x", "Who?"), (None, "x", "Where?")]])
    assert a != b


def byte_tokenizer(folder):
    tokenizers = pytest.importorskip("tokenizers", reason="NO TOKENIZERS: the token view is not tested (pip install 'webseer[train]')")
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    tok.pre_tokenizer, tok.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    folder.mkdir(exist_ok=True)
    tok.save(str(folder/"tokenizer.json"))
    return tok


def tokens_run(folder):
    tok = byte_tokenizer(folder)
    said = ["Prompt é. ", EVIL, " seen 世界", " done"]
    parts = [tok.encode(s).ids for s in said]
    t = traj("Who?", "g", ["g"], ids=sum(parts, []), mask=sum(([k % 2] * len(p) for k, p in enumerate(parts)), []))
    t.logprobs = [-math.inf if k == len(t.ids) - 1 else -0.25 * m for k, m in enumerate(t.mask)]
    save_trajs(p := folder/"tok.jsonl", [t])
    return p, said, parts


def test_tokens_spell_the_text(tmp_path):
    p, said, parts = tokens_run(tmp_path)
    _, (b,), blocks = unpack(view(p, tmp_path/"page.html", tokenizer=tmp_path).read_text())
    texts = [blocks["pieces"][k][1] for k in b["tokens"]["pieces"]]
    assert "".join(t for t in texts if t != "…") == "".join(said) and [blocks["pieces"][k][0] for k in b["tokens"]["pieces"]] == sum(parts, [])
    assert b["tokens"]["mask"] == [len(x) for x in parts] and b["mode"] == "tokens" and b["tokens"]["logprobs"][-1] is None
    assert unpack(view(p, tmp_path/"page.html").read_text())[1][0]["mode"] == "ids"


def test_published_json_lines_are_named_by_their_line(tmp_path):
    p, said = tmp_path/"published.jsonl", "one\u2028two\u2029three\x85four"
    entry = lambda text: dict(messages=[dict(role="user", content="Question: q"), dict(role="assistant", content=text, tool_calls=[call(0, "submit_answer", answer="a")]), dict(role="tool", content="ok")],
                              golden_answers=["a"], success=True)
    lines = [json.dumps(entry(x), ensure_ascii=False) for x in ("first", said)]
    p.write_text("\n" + "\n\n".join(lines), encoding="utf-8", newline="\n")
    index, bodies, _ = unpack(view(p, tmp_path/"page.html").read_text(encoding="utf-8"))
    assert [r[index["fields"].index("place")] for r in index["rows"]] == ["line 2", "line 4"] and any(e["text"] == said for e in bodies[1]["events"])
    for bad in ('{"a": 1}', '{"messages": 3}', "{bad", "[]"):
        p.write_text("\n".join([lines[0], "", bad, lines[0]]))
        with pytest.raises(WebseerError) as e: view(p, tmp_path/"page.html")
        assert f"{p}: line 3 " in str(e.value) and "\n" not in str(e.value)


PUBLISHED = released.published()
needs_published = pytest.mark.skipif(PUBLISHED is None, reason="NO PUBLISHED ROLLOUTS: set WEBSEER_RELEASED to a file of outputs/ of 99hgz/WebSeer")


@needs_published
def test_published_rollouts_keep_every_word(tmp_path):
    raw, rollouts = json.loads(PUBLISHED.read_text()), released.load(PUBLISHED)
    index, bodies, _ = unpack(view(PUBLISHED, tmp_path/"page.html").read_text())
    rows = [dict(zip(index["fields"], r)) for r in index["rows"]]
    assert [r["right"] for r in rows] == [int(x.judged) for x in rollouts] and [r["depth"] for r in rows] == [len(x.calls) for x in rollouts]
    for item, b in zip(raw, bodies):
        shown = [e["text"] for e in b["events"]] + [v for e in b["events"] for _, v in e["args"]]
        for m in item["messages"]:
            assert not (m["content"] or "").strip() or m["content"] in shown
            for c in m.get("tool_calls") or []: assert all(v in shown for v in json.loads(c["function"]["arguments"]).values())


# ---- In a browser ----

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1360,900")


class Browser:
    "Chromium with a page open; every check of the console and of requests goes through here."
    def __init__(self, driver): self.driver = driver

    def js(self, script, *args): return self.driver.execute_script(script, *args)

    def open(self, address):
        self.driver.get("about:blank")
        for log in ("browser", "performance"): self.driver.get_log(log)
        self.driver.get(address if isinstance(address, str) else address.as_uri())

    def wait(self, script, want=True, seconds=8):
        from selenium.webdriver.support.ui import WebDriverWait
        got = lambda _: self.js(f"return ({script})") == want
        try: WebDriverWait(self.driver, seconds, poll_frequency=0.03).until(got)
        except Exception: raise AssertionError(f"{script} is {self.js(f'return ({script})')!r}, not {want!r}; console: {self.driver.get_log('browser')}") from None

    def key(self, *keys):
        from selenium.webdriver.common.action_chains import ActionChains
        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def click(self, css): self.js("document.querySelector(arguments[0]).click()", css)

    def choose(self, id, value): self.js("const n = document.getElementById(arguments[0]); n.value = arguments[1]; n.dispatchEvent(new Event(n.tagName === 'SELECT' ? 'change' : 'input', {bubbles: true}))", id, value)

    def clean(self):
        "No error in the console, and no request but for the page itself."
        asked = [m["params"]["request"]["url"] for e in self.driver.get_log("performance") if (m := json.loads(e["message"])["message"])["method"] == "Network.requestWillBeSent"]
        asked = {u.split("#")[0] for u in asked if not u.startswith("chrome")}
        assert len(asked) <= 1, asked
        assert self.driver.get_log("browser") == []


TITLE = "document.querySelector('.page h2')?.textContent"
COUNT = "document.getElementById('count').textContent"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM or not DRIVER: pytest.skip("NO BROWSER: chromium and chromedriver are not installed, so the page was not opened (apt install chromium chromium-driver)")
    selenium = pytest.importorskip("selenium", reason="NO SELENIUM: the page was not opened in a browser (pip install selenium)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    os.environ["SE_OFFLINE"] = "true"
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"): options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", dict(browser="ALL", performance="ALL"))
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield Browser(driver)
    driver.quit()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    "The page of the two small runs."
    folder = tmp_path_factory.mktemp("pair")
    return view(runs(folder), folder/"page.html", title="Two runs")


def test_filters(browser, pair):
    browser.open(pair)
    browser.wait(COUNT, "6, 67 % right")
    browser.click("#morebutton")
    browser.click("#outcome button[data-value=wrong]")
    browser.wait(COUNT, "2 of 6, 0 % right")
    assert browser.js("return [...document.querySelectorAll('.row .question')].map(n => n.textContent)") == ["Who is the mayor of Brimmere?", "Where does the Osk end?"]
    browser.choose("stop", "max_calls")
    browser.wait(COUNT, "1 of 6, 0 % right")
    browser.click("#clear")
    browser.wait(COUNT, "6, 67 % right")
    for change, n in ((("min", "4"), 3), (("max", "2"), 0), (("subs", "2"), 1), (("fault", "some"), 3), (("fault", "drift"), 1), (("fault", "none"), 3), (("differ", "runs"), 4),
                      (("differ", "some"), 0), (("in", "second"), 3), (("text", "BRIMMERE"), 2)):
        browser.choose(*change)
        browser.wait(f"{COUNT}.split(' ')[0].replace(',', '')", str(n))
        browser.click("#clear")
    browser.choose("text", "let me verify")                                    # stands inside the turns only
    browser.wait(COUNT, "0 of 6")
    browser.click("#deep")
    browser.wait(f"{COUNT}.split(',')[0]", "1 of 6")
    browser.click("#clear")
    browser.choose("sort", "depth")
    browser.click("#desc")
    browser.wait("document.querySelector('.row .facts').textContent.includes('5 calls')")
    assert browser.js("return document.getElementById('count').getAttribute('aria-live')") == "polite"
    browser.clean()


def test_a_trajectory_shows_its_parts(browser, pair):
    browser.open(pair.as_uri() + "#run=second&q=c")
    browser.wait(TITLE, "When was it built?")
    parts = browser.js("return [...document.querySelectorAll('.turn .part')].map(n => [n.dataset.source, n.dataset.kind, n.classList.contains('trained'), n.querySelector('.words, .args')?.textContent ?? ''])")
    assert parts[:3] == [["spliced", "thought", True, "Let me verify this. "], ["model", "thought", True, "I read on."], ["model", "call", True, "querystep 0 When was it built?"]]
    assert parts[3][:3] == ["tool", "result", False] and ["feedback", "feedback", False, "noted"] in parts
    assert "by part" in browser.js("return document.querySelector('.note').textContent")
    browser.open(pair.as_uri() + "#run=second&q=a")
    browser.wait(TITLE, "Who is the mayor of Brimmere?")
    assert browser.js("return document.querySelector('.part.loop .words').textContent") == "No tool was called. Call one tool."
    assert browser.js("return document.querySelector('[data-turn=\"2\"] header .warn').textContent") == "drift"
    assert "500 ms · 100 → 20 tokens" in browser.js("return document.querySelector('[data-turn=\"1\"] > header').textContent")
    browser.open(pair.as_uri() + "#run=first&q=c")
    browser.wait(TITLE, "When was it built?")
    sheet = browser.js("return document.querySelector('.sheet').textContent")
    assert "decay0.64" in sheet and "total0.640" in sheet and "2 submissions" in sheet and "the only allowed submission was made" in sheet
    browser.clean()


def test_hostile_text_is_shown_as_text(browser, pair):
    browser.open(pair.as_uri() + "#run=second&q=b")
    browser.wait(TITLE, "Where does the Osk end?")
    assert browser.js("return [...document.querySelectorAll('.part .words')].filter(n => n.textContent === arguments[0]).length", EVIL) == 4    # two thoughts, two results
    assert browser.js("return [document.images.length, document.querySelectorAll('.page b:not(.chip b), .page script').length, [...document.scripts].filter(s => !s.type).length]") == [0, 0, 1]
    from selenium.common.exceptions import NoAlertPresentException
    with pytest.raises(NoAlertPresentException): browser.driver.switch_to.alert
    browser.choose("text", "<b>bold</b>")                                      # marking what was found makes no markup either
    browser.click("#deep")
    browser.wait("document.querySelectorAll('.page mark').length", 4)
    browser.click("#clear")
    # what the policy forbids fails even if a script tried
    assert browser.js("try { document.body.innerHTML = '<b>x</b>'; return 'set'; } catch (e) { return e.name; }") == "TypeError"
    assert browser.js("return document.getElementById('list') !== null")


def test_compare_links_and_back(browser, pair):
    browser.open(pair)
    browser.wait(COUNT, "6, 67 % right")
    browser.click(".row")
    browser.wait(TITLE, "Who is the mayor of Brimmere?")
    browser.wait("location.hash", "#run=first&q=a")
    browser.key("c")
    browser.wait("location.hash", "#run=first&q=a&with=second")
    browser.wait("document.querySelectorAll('.pairs .turn').length", 3 + 4)
    assert browser.js("return document.querySelector('.parting').textContent") == "The calls are the same up to turn 2 and differ from here on."
    assert browser.js("return [...document.querySelectorAll('.versus tr.differs th')].map(n => n.textContent)") == ["Answer", "Verdict", "Metrics", "Effort", "Time", "Faults"]
    browser.driver.back()
    browser.wait("location.hash + document.querySelectorAll('.pairs').length", "#run=first&q=a0")
    browser.driver.back()
    browser.wait(TITLE, "Choose a trajectory")
    browser.driver.forward()
    browser.wait(TITLE, "Who is the mayor of Brimmere?")
    browser.open(pair.as_uri() + "#run=first&q=b&turn=4&outcome=wrong")                # a link into a turn, with a filter
    browser.wait("document.activeElement.id", "turn-4")
    browser.wait("Math.round(document.activeElement.getBoundingClientRect().top) < 200 && document.activeElement.getBoundingClientRect().top > 0")
    browser.driver.refresh()
    browser.wait("document.activeElement.id", "turn-4")
    browser.wait(COUNT, "2 of 6, 0 % right")
    browser.js("location.hash = '#run=second&q=c&with=first'")                          # an address typed by hand
    browser.wait("document.querySelectorAll('.pairs').length", 1)
    browser.js("location.hash = '#run=third&q=c'")
    browser.wait(TITLE, "There is no trajectory of run “third” and question “c” on this page.")
    browser.clean()


def test_keys(browser, pair):
    from selenium.webdriver.common.keys import Keys
    browser.open(pair)
    browser.wait(COUNT, "6, 67 % right")
    browser.key("j", "j", Keys.ARROW_UP, Keys.ENTER)
    browser.wait(TITLE, "Where does the Osk end?")
    browser.key("j")
    browser.wait(TITLE, "When was it built?")
    browser.key("k")
    browser.wait(TITLE, "Where does the Osk end?")
    browser.key("n", "n")
    browser.wait("document.activeElement.id", "turn-2")
    browser.key("p")
    browser.wait("document.activeElement.id", "turn-1")
    browser.key("/")
    browser.wait("document.activeElement.id", "text")
    browser.key(*"osk")                                                          # letters in a field are letters, and the focus stays
    browser.wait(COUNT, "2 of 6, 50 % right")
    assert browser.js("return document.activeElement.id + document.getElementById('text').value") == "textosk"
    browser.key(Keys.ESCAPE)
    browser.wait("document.activeElement.id", "list")
    browser.key("c")
    browser.wait("document.querySelectorAll('.pairs').length", 1)
    browser.key(Keys.ESCAPE)
    browser.wait("document.querySelectorAll('.pairs').length", 0)
    browser.key("t")
    browser.wait("document.getElementById('said').textContent", "This trajectory has no tokens to show.")
    browser.key("?")
    browser.wait("document.getElementById('about').open")
    browser.key(Keys.ESCAPE)
    browser.wait("document.getElementById('about').open", False)
    browser.key(Keys.ESCAPE)
    browser.wait(TITLE, "Choose a trajectory")
    browser.clean()


def test_tokens(browser, tmp_path):
    p, said, parts = tokens_run(tmp_path)
    browser.open(view(p, tmp_path/"page.html", tokenizer=tmp_path).as_uri() + f"#run=tok&q={question_keys([[(None, '', 'Who?')]])[0][0]}")
    browser.wait(TITLE, "Who?")
    assert "by token" in browser.js("return document.querySelector('.note').textContent")
    browser.key("t")
    browser.wait("document.querySelectorAll('.segment').length", 4)
    assert browser.js("return [...document.querySelectorAll('.segment.trained .t.num')].length") == len(parts[1]) + len(parts[3])
    assert browser.js("return [...document.querySelectorAll('.segment')][1].textContent").startswith(f"{len(parts[1])} tokens · emitted by the policy, trained on · mean log-prob −0.250")
    assert browser.js("return [...document.querySelectorAll('.t.num small')].at(-1).textContent") == "–"
    assert browser.js("return [...document.querySelectorAll('.segment.trained')][0].querySelectorAll('.t.num > span').length") == len(parts[1])
    browser.wait("location.hash.endsWith('tokens=1')")
    browser.clean()


CONTRAST = """
const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return [m[0], m[1], m[2], m[3] ?? 1]; };
const lum = c => { const [r, g, b] = c.map(v => { v /= 255; return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; }); return .2126 * r + .7152 * g + .0722 * b; };
const ground = n => { for (; n; n = n.parentElement) { const c = parse(getComputedStyle(n).backgroundColor); if (c[3] > .99) return c; } return [255, 255, 255]; };
const bad = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let seen = 0;
for (let t; t = walk.nextNode();) {
  const n = t.parentElement;
  if (!t.textContent.trim() || n.closest('script, noscript, option, .jump, dialog:not([open])') || !n.checkVisibility()) continue;
  const [a, b] = [lum(parse(getComputedStyle(n).color).slice(0, 3)), lum(ground(n).slice(0, 3))].sort((x, y) => y - x), ratio = (a + .05) / (b + .05);
  seen++;
  if (ratio < 4.5) bad.push([t.textContent.slice(0, 30), n.className, ratio.toFixed(2)]);
}
return [seen, bad];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_narrow(browser, pair, scheme):
    try:
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(features=[dict(name="prefers-color-scheme", value=scheme)]))
        for place in ("#run=second&q=a", "#run=first&q=a&with=second", "#run=second&q=c"):
            browser.open(pair.as_uri() + place)
            browser.wait("document.querySelectorAll('.turn').length > 2")
            dark = browser.js("return getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"
            seen, bad = browser.js(CONTRAST)
            assert seen > 60 and not bad and dark == (scheme == "dark")
        browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", dict(width=400, height=800, deviceScaleFactor=1, mobile=False))
        for place in ("", "#run=second&q=b", "#run=first&q=a&with=second"):
            browser.open(pair.as_uri() + place)
            browser.wait("document.querySelectorAll('.turn').length > 2 || document.querySelectorAll('.row').length === 6")
            assert browser.js("return document.documentElement.scrollWidth") <= 400
            assert browser.js("return getComputedStyle(document.querySelector('.side')).display") == ("none" if place else "flex")
        browser.click(".tools .back")
        browser.wait("document.querySelector('.side').checkVisibility()")
        browser.clean()
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(features=[]))


def test_a_narrow_window_breaks_no_button_and_cuts_no_choice(browser, tmp_path):
    names = [tmp_path/f"{'a-long-name-of-a-run-' * 2}{i}.jsonl" for i in (1, 2)]
    for old, new in zip(runs(tmp_path), names): old.rename(new)
    page = view(names, tmp_path/"page.html", title="A title that is far too long for a window of five hundred pixels")
    try:
        for width in (400, 500, 1280):
            browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", dict(width=width, height=800, deviceScaleFactor=1, mobile=False))
            browser.open(page.as_uri() + f"#run={names[0].stem}&q=c&with={names[1].stem}")
            browser.wait("document.querySelectorAll('.pairs').length", 1)
            tall, wide = browser.js("return [[...document.querySelectorAll('header.bar button')].map(n => n.offsetHeight), document.documentElement.scrollWidth]")
            assert max(tall) < 40 and wide <= width
            cell, choice, how = browser.js("""const s = document.querySelector('.versus select'), r = s.getBoundingClientRect(), p = s.parentElement.getBoundingClientRect();
                return [[p.left, p.right], [r.left, r.right], getComputedStyle(s).textOverflow]""")
            assert cell[0] <= choice[0] and choice[1] <= cell[1] and how == "ellipsis"
            assert width > 800 or choice[1] - choice[0] > .9 * (cell[1] - cell[0] - 12)
        browser.clean()
    finally: browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_theme_is_remembered(browser, pair):
    browser.open(pair)
    for name in ("light", "dark"):
        browser.click("#theme")
        browser.wait("document.documentElement.dataset.theme", name)
    browser.driver.refresh()
    browser.wait("document.documentElement.dataset.theme", "dark")
    browser.click("#theme")
    browser.wait("document.getElementById('theme').textContent", "Theme: system")


@contextmanager
def served(folder):
    "The folder over HTTP on loopback, with the paths that were asked for."
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args): super().__init__(*args, directory=str(folder))
        def do_GET(self): asked.append(self.path); super().do_GET()
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_port}", asked
    finally: server.shutdown(); server.server_close()


def test_a_served_page_asks_for_nothing_else(browser, pair):
    with served(pair.parent) as (at, asked):
        browser.open(f"{at}/page.html#run=second&q=b")
        browser.wait(TITLE, "Where does the Osk end?")
        browser.key("c")
        browser.wait("document.querySelectorAll('.pairs').length", 1)
        assert asked == ["/page.html"]                                               # not even an icon
    browser.clean()


def many(n, rng):
    "Trajectories of about 10 kB, from text that compresses as prose does."
    alphabet = ["".join(rng.choices("aeioulnrstdmk", k=rng.randint(2, 9))) for _ in range(6000)]
    words = [alphabet[min(5999, int(rng.paretovariate(0.35)) - 1)] for _ in range(400_000)]
    def text(k): at = rng.randrange(len(words) - k); return " ".join(words[at:at + k])
    made = [traj("", "gold", [rng.choice(["gold", "gold", "other"])] if rng.random() < 0.9 else [], result=text(190), thought=text(25), steps=rng.randint(2, 9)) for _ in range(500)]
    for i in range(n): yield replace(made[i % 500], question=f"{text(8)} number {i}?", qid=str(i))    # 500 differ; blocks are packed one by one, so that saves no room in the page


def test_five_thousand_are_usable_within_two_seconds(browser, tmp_path):
    save_trajs(p := tmp_path/"many.jsonl", many(5000, random.Random(0)))
    size = p.stat().st_size / 5000
    assert 9_000 < size < 16_000
    page = view(p, tmp_path/"page.html")
    assert page.stat().st_size < 0.5 * p.stat().st_size
    first, opened = [], []
    for _ in range(3):
        browser.open(page)
        browser.click("#outcome button[data-value=wrong]")
        browser.wait("/^[0-9,]+ of 5,000, 0 % right$/.test(document.getElementById('count').textContent)")
        first.append(round(browser.js("return performance.now()")))                           # ms since the start of the navigation
        browser.js("document.querySelectorAll('.row')[3].click()")
        browser.wait("document.querySelectorAll('.turn').length > 1")
        opened.append(round(browser.js("return performance.now()")))
    print(f"\n5,000 trajectories of {size / 1000:.1f} kB, page of {page.stat().st_size / 1e6:.1f} MB: list filtered after {first} ms, a trajectory open after {opened} ms")
    assert sorted(first)[1] < 2000
    assert browser.js("return document.querySelectorAll('.row').length") < 60                # only what is in sight is drawn
    browser.js("document.getElementById('list').scrollTop = 1e9")
    browser.wait("[...document.querySelectorAll('.row')].at(-1).getAttribute('aria-posinset') === [...document.querySelectorAll('.row')].at(-1).getAttribute('aria-setsize')")
    browser.click("#clear")
    browser.choose("text", "number 4321?")
    browser.wait(f"{COUNT}.split(',')[0]", "1 of 5")
    browser.clean()


@needs_published
def test_published_rollouts_open(browser, tmp_path):
    browser.open(view(PUBLISHED, tmp_path/"page.html"))
    browser.wait(f"{COUNT}.startsWith('40, ')")
    rollouts = released.load(PUBLISHED)
    browser.click("#outcome button[data-value=wrong]")
    browser.wait(f"{COUNT}.split(' ')[0]", str(sum(r.judged is False for r in rollouts)))
    browser.click("#clear")
    browser.choose("differ", "0-3")                                                          # judge and recall, as the list of chapter 13
    odd = sum(r.judged != (score_answer(r.answer, r.golds)["recall"] > 0.9) for r in rollouts)
    browser.wait(f"{COUNT}.split(' ')[0]", str(odd))
    browser.click("#clear")
    for k, r in enumerate(rollouts[:5]):
        browser.js("document.getElementById('list').scrollTop = 0")
        browser.wait(f"document.getElementById('row{k}') !== null")
        browser.click(f"#row{k}")
        browser.wait(TITLE, r.question)
        browser.wait("document.querySelectorAll('.part[data-kind=call], .part[data-kind=submission]').length", len(r.calls))
    browser.clean()


def test_rollouts_of_the_loop_can_be_viewed(tmp_path):
    "Trajectories as the loop leaves them: with what the tools depend on, the oracle's path, an error."
    from webseer.agent import ScriptedPolicy, call_text, rollouts, run_sync
    from webseer.retrieval import MiniWeb
    from webseer.tools import Tools
    from webseer.traj import save_trajs
    from webseer.world import Question, World
    q = Question("q", "Who?", ("Ada",), 1, "chain", (("a", "b", "c"),), 0)
    def script(traj):
        yield call_text("search", query="x")
        yield call_text("submit_answer", answer="Ada")
    ts = run_sync(rollouts(ScriptedPolicy(script), [(Tools(MiniWeb(World(0))), q)] * 2))
    assert ts[0].meta["tools"]
    save_trajs(tmp_path/"run.jsonl", ts)
    assert view([tmp_path/"run.jsonl"], tmp_path/"run.html").stat().st_size > 10_000
