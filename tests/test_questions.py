"""Question sets: every published format, its faults, copies and overlap, the manifest, recipes, verl's files, the hub itself on loopback."""
import csv
import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from webseer import questions as Q
from webseer.agent import call_text, first_messages, render, system_text
from webseer.batch import read_questions
from webseer.core import WebseerError, load_profile
from webseer.evaluate import test_world as world_of_test
from webseer.questions import (RECIPES, SETS, SPLITS, SetQuestion, drop_copies, load_rl, load_set, miniweb_questions, overlap, parse_files, prepare, prepare_sft,
                               read_rows, released_rows, rl_question, rl_questions_of_step, rl_rows, save_rl, sft_rows)
from webseer.remote import running_app
from webseer.synth import save_sft, save_text
from webseer.tools import TOOLS, WEB_TOOLS
from webseer.traj import Traj, save_trajs

SMOKE = load_profile("smoke")

def told(f, *args, **kw):
    with pytest.raises(WebseerError) as e: f(*args, **kw)
    text = str(e.value)
    assert "\n" not in text and "Traceback" not in text
    return text

# what the publishers publish, with invented content

def jsonl(rows): return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
def listed(rows): return json.dumps(rows).encode()
def parquet(rows):
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()
def table(rows, delimiter=","):
    out = io.StringIO()
    w = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    w.writeheader()
    w.writerows(rows)
    return out.getvalue().encode()
def tsv(rows): return table(rows, "\t")

FACTS = [["Blue Hall", 0], ["Ada Vel", 2], ["Blue Hall", 3]]
TRIVIA = {"Aliases": ["Vel", "A. Vel"], "MatchedWikiEntityName": "Ada Vel", "NormalizedAliases": ["vel", "vel"], "NormalizedMatchedWikiEntityName": "ada vel",
          "NormalizedValue": "ada vel", "Type": "WikipediaEntity", "Value": "Ada Vel"}
HUB_TRIVIA = dict(aliases=["Vel", "A. Vel"], matched_wiki_entity_name="Ada Vel", normalized_aliases=["vel"], normalized_matched_wiki_entity_name="", normalized_value="ada vel",
                  type="WikipediaEntity", value="Ada Vel")
POP = dict(id=1850297, subj="Blue Hall", prop="architect", obj="Ada Vel", subj_id=1, prop_id=22, obj_id=2, s_aliases='["B. Hall"]', o_aliases='["A. Vel"]',
           s_uri="http://x/Q1", o_uri="http://x/Q2", s_wiki_title="Blue Hall", o_wiki_title="Ada Vel", s_pop=142, o_pop=25692,
           question="Who is the architect of Blue Hall?", possible_answers='["Ada Vel", "A. Vel"]')
DEV = dict(id="ab12", question="How many doors has each hall?", answer={"Blue": 3, "Red": [1, 2.5], "open": True}, categories=["Art", "Math"],
           decomposition=[dict(id="1", question="Blue?", answer=3, depends_on=[], evidence=dict(pageid=1, revid=2, title="Blue", url="u"), decomposition=[]),
                          dict(id="2", question="Others?", answer=[1], depends_on=["1"], evidence=None,
                               decomposition=[dict(id="3", question="Red?", answer=1, depends_on=[], evidence=dict(pageid=1, revid=2, title="Red", url="u"), decomposition=[])] * 2)])
FRAME = {"Prompt": "Who built the hall that Ada sold?", "Answer": "Bo Wick", **{f"wikipedia_link_{i}": "" for i in range(1, 12)}, "wikipedia_link_11+": "",
         "reasoning_types": "Multiple constraints | Tabular reasoning", "wiki_links": "['https://x/A', 'https://x/B', 'https://x/C']"}
MUSIQUE = dict(id="3hop1__1_2_3", paragraphs=[dict(idx=0, title="Blue", paragraph_text="…", is_supporting=True)], question="Who leads the maker of Blue?",
               question_decomposition=[dict(id=i, question="#1 >> maker", answer="x", paragraph_support_idx=0) for i in (1, 2, 3)], answer="Ada Vel",
               answer_aliases=["A. Vel", "Vel"], answerable=True)
HOTPOT = dict(_id="5a7a", answer="Ada Vel", question="Who owns Blue Hall?", supporting_facts=FACTS, context=[["Blue Hall", ["It is blue.", "It is tall."]]], type="bridge", level="hard")
HUB_HOTPOT = dict(id="5a7a", question=HOTPOT["question"], answer="Ada Vel", type="bridge", level="hard",
                  supporting_facts=dict(title=["Blue Hall", "Ada Vel"], sent_id=[0, 2]), context=dict(title=["Blue Hall"], sentences=[["It is blue."]]))
WIKI = dict(_id="8813", type="bridge_comparison", question="Who is older?", context=[["A", ["s"]]], supporting_facts=FACTS, entity_ids="Q1_Q2",
            evidences=[["A", "born", "1900"], ["B", "born", "1910"], ["C", "maker", "A"], ["D", "maker", "B"]], answer="Ada Vel", evidences_id=[], answer_id="Q7")
RL = dict(data_source="rag", prompt=[dict(role="system", content="You are a reasoning assistant."), dict(role="user", content="Question: Who owns Blue Hall?")], ability="rag",
          reward_model=dict(style="rule", ground_truth="Ada Vel"),
          extra_info=dict(split="train", index=0, answer="Ada Vel", question="Who owns Blue Hall?", seed=733, need_tools_kwargs=True,
                          tools_kwargs=dict(submit_answer=dict(create_kwargs=dict(seed=733, ground_truth="Ada Vel")), search=dict(create_kwargs=dict(seed=733)))))
FLASH = dict(id="train_0", question="Who owns Blue Hall?", golden_answers=["Ada Vel"], metadata=dict(type="bridge", level="medium", supporting_facts=dict(title=["A", "B"], sent_id=[0, 1])))

FORMATS = {   # set, part, file, content, what it says of its first question: qid, golds, hops, kind, difficulty
    "nq": ("nq", "train", "NQ-open.train.jsonl", jsonl([dict(question="who owns blue hall", answer=["Ada Vel", "Ada"])]), ("nq-train-1", ("Ada Vel", "Ada"), 0, "", "")),
    "nq gz": ("nq", "test", "NQ-open.dev.jsonl.gz", gzip.compress(jsonl([dict(question="who owns blue hall", answer=["Ada Vel"])])), ("nq-test-1", ("Ada Vel",), 0, "", "")),
    "nq hub": ("nq", "test", "validation-00000-of-00001.parquet", parquet([dict(question="who owns blue hall", answer=["Ada Vel"])]), ("nq-test-1", ("Ada Vel",), 0, "", "")),
    "triviaqa": ("triviaqa", "test", "unfiltered-web-dev.json", json.dumps({"Data": [{"Answer": TRIVIA, "EntityPages": [], "Question": "Who owns Blue Hall?", "QuestionId": "tc_1",
                 "QuestionSource": "x", "SearchResults": []}], "Domain": "unfiltered", "VerifiedEval": False, "Version": 1.0}).encode(),
                 ("tc_1", ("Ada Vel", "Vel", "A. Vel"), 0, "WikipediaEntity", "")),
    "triviaqa hub": ("triviaqa", "train", "train-00000-of-00001.parquet", parquet([dict(question="Who owns Blue Hall?", question_id="tc_1", question_source="x", answer=HUB_TRIVIA)]),
                     ("tc_1", ("Ada Vel", "Vel", "A. Vel"), 0, "WikipediaEntity", "")),
    "hotpotqa": ("hotpotqa", "train", "hotpot_train_v1.1.json", listed([HOTPOT]), ("5a7a", ("Ada Vel",), 2, "bridge", "hard")),
    "hotpotqa hub": ("hotpotqa", "test", "validation-00000-of-00001.parquet", parquet([HUB_HOTPOT]), ("5a7a", ("Ada Vel",), 2, "bridge", "hard")),
    "2wikimultihopqa": ("2wikimultihopqa", "test", "dev.json", listed([WIKI]), ("8813", ("Ada Vel",), 4, "bridge_comparison", "")),
    "2wikimultihopqa hub": ("2wikimultihopqa", "train", "train-00000-of-00002.parquet", parquet([dict(HUB_HOTPOT, level="")]), ("5a7a", ("Ada Vel",), 2, "bridge", "")),
    "musique": ("musique", "test", "musique_ans_v1.0_dev.jsonl", jsonl([MUSIQUE]), ("3hop1__1_2_3", ("Ada Vel", "A. Vel", "Vel"), 3, "3hop1", "")),
    "bamboogle hub": ("bamboogle", "test", "test-00000-of-00001.parquet", parquet([dict(Question="Who owns Blue Hall?", Answer="Ada Vel")]), ("bamboogle-test-1", ("Ada Vel",), 2, "", "")),
    "bamboogle": ("bamboogle", "test", "bamboogle.csv", table([dict(Question="Who owns Blue Hall?", Answer="Ada Vel")]), ("bamboogle-test-1", ("Ada Vel",), 2, "", "")),
    "popqa": ("popqa", "test", "popQA.tsv", tsv([POP]), ("1850297", ("Ada Vel", "A. Vel"), 1, "architect", "")),
    "simpleqa": ("simpleqa", "test", "simple_qa_test_set.csv", table([dict(metadata="{'topic': 'Art', 'answer_type': 'Person', 'urls': ['https://x']}", problem='Who, in "Blue",\nowns it?',
                 answer="Ada Vel")]), ("simpleqa-test-1", ("Ada Vel",), 0, "Person", "")),
    "fanoutqa": ("fanoutqa", "test", "fanout-final-dev.json", listed([DEV]), ("ab12", ("Blue: 3, Red: 1, 2.5, open: yes",), 3, "Art, Math", "")),
    "frames": ("frames", "test", "test.tsv", tsv([FRAME]), ("frames-test-1", ("Bo Wick",), 3, "Multiple constraints | Tabular reasoning", "")),
    "hotpotqa-flashrag": ("hotpotqa-flashrag", "train", "first10k.jsonl", jsonl([FLASH]), ("train_0", ("Ada Vel",), 2, "bridge", "medium")),
    "any set in FlashRAG's form": ("musique", "test", "dev.jsonl", jsonl([dict(id="dev_1", question="Who?", golden_answers=["Ada Vel", "x"], metadata=None)]), ("dev_1", ("Ada Vel", "x"), 0, "", "")),
    "webseer-rl": ("webseer-rl", "train", "train.parquet", parquet([RL]), ("seed-733", ("Ada Vel",), 0, "", ""))}

@pytest.mark.parametrize("key", FORMATS)
def test_published_formats(key, tmp_path):
    name, split, file, data, (qid, golds, hops, kind, difficulty) = FORMATS[key]
    (tmp_path/file).write_bytes(data)
    for path in (tmp_path/file, tmp_path):                                      # a file, or the folder it lies in
        (q,), facts = load_set(name, split, path)
        assert (q.qid, q.golds, q.hops, q.kind, q.difficulty, q.source, q.split) == (qid, golds, hops, kind, difficulty, name, split)
        assert q.text and not q.text.startswith("Question:") and q.world is None
        assert facts["files"] == [dict(name=file, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())] and (facts["rows"], facts["without_answer"]) == (1, 0)
    assert parse_files([f"{name}={tmp_path/file}"]) == {(name, split): tmp_path/file}

def test_aliases_beside_2wiki(tmp_path):
    (tmp_path/"dev.json").write_bytes(listed([WIKI]))
    (tmp_path/"id_aliases.json").write_bytes(jsonl([dict(Q_id="Q6", aliases=["no"]), dict(Q_id="Q7", aliases=["A. Vel", "Ada Vel"], demonyms=[])]))
    assert load_set("2wikimultihopqa", "test", tmp_path)[0][0].golds == ("Ada Vel", "A. Vel")
    (tmp_path/"id_aliases.json").write_bytes(jsonl([dict(Q_id="Q7", aliases=["A. Vel"], demonyms=["Velian"])]))       # the authors' evaluation accepts both
    assert load_set("2wikimultihopqa", "test", tmp_path)[0][0].golds == ("Ada Vel", "A. Vel", "Velian")
    (tmp_path/"id_aliases.json").write_bytes(jsonl([dict(Q_id="Q7", aliases=[], demonyms=7)]))
    assert "id_aliases.json, line 1: the field demonyms" in told(load_set, "2wikimultihopqa", "test", tmp_path)
    (tmp_path/"id_aliases.json").write_bytes(jsonl([dict(Q_id="Q6")]))
    assert "id_aliases.json, line 1: no field aliases" in told(load_set, "2wikimultihopqa", "test", tmp_path)

def test_an_answer_may_begin_with_a_bracket(tmp_path):
    row = dict(RL, reward_model=dict(style="rule", ground_truth="[REC] (film)"))
    (tmp_path/"train.parquet").write_bytes(parquet([row]))
    (tmp_path/"test.parquet").write_bytes(parquet([RL]))
    assert load_set("webseer-rl", "train", tmp_path)[0][0].golds == ("[REC] (film)",)
    m = prepare("webseer-rl", tmp_path/"out", {"webseer-rl": tmp_path}, shared="keep")          # a clone holds both parts
    assert {s: d["questions"] for s, d in m["sets"]["webseer-rl"].items()} == dict(train=1, test=1)

def test_nothing_is_written_where_a_set_is_left_empty(tmp_path):
    (tmp_path/"NQ-open.train.jsonl").write_bytes(jsonl([dict(question="who?", answer=["a"])]))
    (tmp_path/"NQ-open.dev.jsonl").write_bytes(jsonl([dict(question="Who", answer=["a"])]))
    assert "nq, train: no question is left: all are copies of test questions" in told(prepare, ["miniweb", "nq"], tmp_path/"out", {"nq": tmp_path},
                                                                                      profile="smoke", limit=2)
    assert not (tmp_path/"out").exists()

@pytest.mark.parametrize("name, file, data", [
    ("triviaqa", "unfiltered-web-dev.json", json.dumps({"Data": [{"Question": "a?", "QuestionId": "1"}, {"Question": "b?", "QuestionId": "2", "Answer": TRIVIA}]}).encode()),
    ("triviaqa", "validation.parquet", parquet([dict(question="a?", question_id="1", answer=dict(HUB_TRIVIA, value="<unk>", aliases=[])), dict(question="b?", question_id="2", answer=HUB_TRIVIA)])),
    ("musique", "musique_ans_v1.0_dev.jsonl", jsonl([dict(MUSIQUE, answerable=False), MUSIQUE])),
    ("hotpotqa", "validation.parquet", parquet([dict(HUB_HOTPOT, answer=None), HUB_HOTPOT]))])
def test_hidden_answers_are_counted(name, file, data, tmp_path):
    (tmp_path/file).write_bytes(data)
    qs, facts = load_set(name, "test", tmp_path)
    assert len(qs) == 1 and (facts["rows"], facts["without_answer"]) == (2, 1)

# faults: file, place, field

NEEDED = [("nq", "question"), ("nq", "answer"), ("hotpotqa", "question"), ("hotpotqa", "answer"), ("2wikimultihopqa", "answer"), ("musique", "question"), ("musique", "answer"),
          ("musique", "answer_aliases"), ("fanoutqa", "question"), ("fanoutqa", "answer"), ("hotpotqa-flashrag", "golden_answers"), ("popqa", "possible_answers"), ("popqa", "question"),
          ("simpleqa", "problem"), ("simpleqa", "answer"), ("frames", "Prompt"), ("frames", "Answer"), ("bamboogle", "Question"), ("webseer-rl", "prompt"), ("webseer-rl", "reward_model")]
ROWS = dict(nq=dict(question="who", answer=["a"]), hotpotqa=HOTPOT, musique=MUSIQUE, fanoutqa=DEV, popqa=POP, frames=FRAME, bamboogle=dict(Question="Who?", Answer="a"),
            simpleqa=dict(metadata="{}", problem="Who?", answer="a")) | {"2wikimultihopqa": WIKI, "hotpotqa-flashrag": FLASH, "webseer-rl": RL}

@pytest.mark.parametrize("name, field", NEEDED)
def test_a_wrong_row_names_file_place_and_field(name, field, tmp_path):
    good, path = ROWS[name], tmp_path/"x.jsonl"
    path.write_bytes(jsonl([good, {k: v for k, v in good.items() if k != field}]))
    said = told(load_set, name, list(SETS[name].splits)[-1], path)
    assert said.startswith(f"{path}, line 2: no field {'answer' if field == 'golden_answers' else field} (it has ") or "golden_answers" in said
    for wrong in (7.5, [], {"x": 1}, "", None, [7]):
        if (field, wrong) in (("answer_aliases", []), ("answer_aliases", "")) or (name, field, wrong) == ("hotpotqa", "answer", None) or (name, field, wrong) == ("2wikimultihopqa", "answer", None): continue
        if wrong == 7.5 and field in ("question", "answer", "problem", "Prompt", "Answer", "Question") and (name, field) != ("nq", "answer"): continue    # a number is readable as text
        if name == "fanoutqa" and field == "answer" and wrong in (7.5, {"x": 1}, [7]): continue                                     # all of these are answers there
        path.write_bytes(jsonl([good, {**good, field: wrong}]))
        said = told(load_set, name, list(SETS[name].splits)[-1], path)
        assert said.startswith(f"{path}, line 2") and field in said, said

@pytest.mark.parametrize("file, data, said", [
    ("x.json", b'[{"question": "a", "answer": ["b"]},\n {"question": "a", "answer"', "entry 2 (line 2): not JSON"),
    ("x.json", b'[{"question": "a", "answer": ["b"]},\n', "entry 2 (line 2): the list has no end"),
    ("x.jsonl", b'{"question": "a", "answer": ["b"]}\nnonsense\n', "line 2: not JSON ('nonsense')"),
    ("x.jsonl", b'{"question": "a", "answer": ["b"]}\n[1]\n', "line 2: a list, not an object"),
    ("x.jsonl", b'\xff\xfe\x00', "not UTF-8"), ("x.jsonl", b"", "holds no rows"), ("x.json", b"[]", "holds no rows"),
    ("x.csv", b'question,answer\n"a,b\n', "line 2: not CSV"), ("x.csv", b"question,answer\na,b,c,d\n", "line 2: 2 more columns"), ("x.csv", b"question,answer\n", "holds no rows"),
    ("x.tsv", b"question\tanswer\nonly\n", "line 2: the field answer"), ("x.parquet", b"PAR1 no", "not readable as parquet"), ("x.jsonl.gz", b"no gzip", "cannot be read"),
    ("x.jsonl.gz", gzip.compress(b'{"question": "a"}', mtime=0)[:-9], "cannot be read"), ("x.jsonl.gz", gzip.compress(b"", mtime=0)[:10] + b"\xff" * 9, "cannot be read"), ("x.pdf", b"%PDF", "the ending .pdf is not known"),
    ("x.json", b'[' + b'[' * 100_000, "nested too deeply"), ("x.jsonl", b'{"question": "a", "answer": ["", " "]}\n', "line 1: the field answer holds no answer")])
def test_wrong_files(file, data, said, tmp_path):
    (tmp_path/file).write_bytes(data)
    assert said in (text := told(load_set, "nq", "train", tmp_path/file)) and str(tmp_path/file) in text

@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=60) | st.text(max_size=40).map(str.encode), ending=st.sampled_from(["json", "jsonl", "csv", "tsv", "parquet", "jsonl.gz"]),
       head=st.sampled_from(["", "[", '{"Data": [', "a,b\n"]), name=st.sampled_from(sorted(n for n in SETS if SETS[n].read)))
def test_any_bytes_give_questions_or_one_sentence(data, ending, head, name, tmp_path):
    path = tmp_path/f"x.{ending}"
    path.write_bytes(head.encode() + data)
    try: load_set(name, list(SETS[name].splits)[0], path)
    except WebseerError as e: assert "\n" not in str(e)

json_value = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3), max_leaves=8)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.dictionaries(st.text(max_size=5), json_value, max_size=4), max_size=6), size=st.integers(1, 9), indent=st.sampled_from([None, 1]), wrapped=st.booleans())
def test_a_list_is_read_in_pieces_of_any_size(rows, size, indent, wrapped, tmp_path):
    text = json.dumps(rows, ensure_ascii=False, indent=indent)
    (tmp_path/"x.json").write_text('{"Data": ' + text + ', "Domain": "x"}' if wrapped else text, encoding="utf-8", newline="")
    old, Q._CHUNK = Q._CHUNK, size
    try: out = list(read_rows(tmp_path/"x.json"))
    finally: Q._CHUNK = old
    assert [r for _, r in out] == rows and [int(re.search(r"entry (\d+)", w)[1]) for w, _ in out] == list(range(1, len(rows) + 1))

def test_places_are_lines_of_the_file(tmp_path):
    (tmp_path/"x.json").write_text('\n[\n\n{"a": 1},\n\n\n{"a":\n2}\n, {"a": 3}]')
    assert [int(re.search(r"line (\d+)", w)[1]) for w, _ in read_rows(tmp_path/"x.json")] == [4, 7, 9]
    (tmp_path/"x.csv").write_text('a,b\n"1\n1",2\n3,4\n')
    assert [w.rsplit(" ", 1)[1] for w, _ in read_rows(tmp_path/"x.csv")] == ["2", "4"]
    (tmp_path/"one.json").write_text('{\n "question": "who",\n "answer": ["a"]\n}\n')
    assert load_set("nq", "train", tmp_path/"one.json")[0][0].golds == ("a",)

# names and files

def test_names_and_files(tmp_path):
    assert "did you mean 'hotpotqa'" in told(prepare, "hotpotq", tmp_path/"o")
    (tmp_path/"questions.jsonl").write_bytes(jsonl([ROWS["nq"]]))
    for wrong, said in (([f"nq={tmp_path}/questions.jsonl"], "nq:train=… or nq:test=…"), (["nq"], "write NAME=PATH"), (["nq:dev=x"], "train"), (["miniweb=x"], "no files"),
                        ([f"nq={tmp_path}/none"], "no file or folder"), ([f"frames={tmp_path}"], "not among those to prepare"), ([f"nq={tmp_path}/empty"], "no part")):
        (tmp_path/"empty").mkdir(exist_ok=True)
        assert said in told(prepare, "nq", tmp_path/"o", wrong)
    assert not (tmp_path/"o").exists()
    m = prepare("nq", tmp_path/"o", {"nq:train": tmp_path/"questions.jsonl"})
    assert list(m["sets"]["nq"]) == ["train"] and not (tmp_path/"o/test.parquet").exists()
    prepare("nq", tmp_path/"o", {"nq:test": tmp_path/"questions.jsonl"}, splits=["test"])          # another preparation in the same folder
    assert (tmp_path/"o/test.parquet").exists() and not (tmp_path/"o/train.parquet").exists()
    assert "holds questions, not conversations: webseer data prepare nq" in told(prepare_sft, "nq", tmp_path/"s")
    assert "webseer data sft webseer-sft" in told(prepare, "webseer-sft", tmp_path/"o") and "alf" not in told(prepare, "nq", tmp_path/"o", near=2)

# copies

def q(text, *golds, world=None, qid="", source=""): return SetQuestion(qid, text, golds or ("x",), 0, "", (), world, source=source)
LONG = "In which of the seven small towns along the old northern river did the painter who later founded the blue museum teach drawing to children in {}?"

def test_copies_need_a_common_answer_unless_they_are_equal():
    kept, n = drop_copies([q(LONG.format(1901), "Ode"), q(LONG.format(1902), "ode!"), q(LONG.format(1903), "Lin"), q("Who?", "a"), q("who", "b"), q("Whom?", "a")])
    assert [x.golds[0] for x in kept] == ["Ode", "Lin", "a", "a"] and n == dict(copies=1, near_copies=1, copies_with_another_answer=1)
    assert len(drop_copies([q(LONG.format(1)), q(LONG.format(2))], None)[0]) == 2
    words = [q("Who is the spouse of the founder of the employer of Ada?", world="w"), q("Who is the founder of the employer of the spouse of Ada?", world="w")]
    assert len(drop_copies(words)[0]) == 2 and len(drop_copies([q("Who?", world="w"), q("Who?", world="v"), q("Who?", world="w")])[0]) == 2

def test_overlap_names_both_sides():
    train, test = [q("New?"), q(LONG.format(1), "Ode"), q("Old?", "b"), q(LONG.format(3), "Lin")], [q("old", "a"), q(LONG.format(2), "Ode")]
    assert [(i, j) for i, j, _ in overlap(train, test)] == [(1, 1), (2, 0)] and 0.9 <= overlap(train, test)[0][2] < 1
    assert overlap([q("Twice?"), q("twice")], [q("Once?")]) == []               # a copy inside one part is none of the other
    assert [(i, j) for i, j, _ in overlap([q(LONG.format(3), "Lin")], [q(LONG.format(1), "Ode"), q(LONG.format(2), "lin")])] == [(0, 1)]
    assert overlap(train, []) == [] == overlap([], test) and [i for i, *_ in overlap(train, test, None)] == [2]

# prepare

def write_sets(folder):
    hard = [dict(HOTPOT, _id=f"h{i}", question=f"Who owns hall number {i} of the town?", level=("easy", "medium", "hard")[i % 3], type=("bridge", "comparison")[i % 2],
                 answer=f"Owner {i}") for i in range(30)]
    (folder/"hotpot_train_v1.1.json").write_bytes(listed(hard + [dict(hard[0], _id="again"), dict(hard[2], _id="h1", question="Wholly new?")]))
    (folder/"hotpot_dev_distractor_v1.json").write_bytes(listed([dict(hard[5], _id="d1", question="WHO owns hall number 5 of town"), dict(hard[8], _id="d2", question="Which hall is it?")]))
    (folder/"NQ-open.train.jsonl").write_bytes(jsonl([dict(question="who owns hall number 7 of the town", answer=["Owner 7"]), dict(question="who is new", answer=["b", "c"])]))
    return {"hotpotqa": folder, "nq:train": folder/"NQ-open.train.jsonl"}

def test_prepare_counts_and_hashes_what_it_writes(tmp_path):
    m = prepare(["hotpotqa", "nq"], tmp_path/"o", write_sets(tmp_path))
    h = m["sets"]["hotpotqa"]["train"]
    assert (h["rows"], h["copies"], h["shared_with_test"], h["shared_left_out"], h["left"], h["questions"]) == (32, 1, 1, 1, 30, 30)
    assert m["sets"]["nq"]["train"]["copies"] == 1 and m["sets"]["nq"]["train"]["questions"] == 1 and m["sets"]["nq"]["train"]["golds"] == 2
    assert json.loads((tmp_path/"o/manifest.json").read_text()) == m and "test" not in m["sets"]["nq"]
    for name, parts in m["sets"].items():
        for split, d in parts.items():
            for f, sha in d["files"].items(): assert hashlib.sha256((tmp_path/"o"/name/split/f).read_bytes()).hexdigest() == sha
    for f, d in m["files"].items(): assert hashlib.sha256((tmp_path/"o"/f).read_bytes()).hexdigest() == d["sha256"] and len(load_rl(tmp_path/"o"/f)) == d["rows"]
    rows = load_rl(tmp_path/"o/train.parquet")
    assert [r["extra_info"]["index"] for r in rows] == list(range(31)) and {r["data_source"] for r in rows} == {"hotpotqa", "nq"}
    assert "WHO owns hall number 5" not in str(rows) and len({r["prompt"][1]["content"] for r in rows}) == 31
    ours = read_questions(tmp_path/"o/hotpotqa/train/questions.jsonl")          # our schema: the batch runner reads it
    alone = load_rl(tmp_path/"o/hotpotqa/train/rl.parquet")
    assert [(x.qid, x.text, x.golds, x.hops) for x in ours] == [(r["extra_info"]["qid"], r["prompt"][1]["content"], tuple(json.loads(r["extra_info"]["golds"])), r["extra_info"]["hops"]) for r in alone]
    assert len({x.qid for x in ours}) == len(ours) and "h1-2" in {x.qid for x in ours}     # an identifier that stood there twice
    back, _ = load_set("hotpotqa", "train", tmp_path/"o/hotpotqa/train/questions.jsonl")   # and so do we
    assert [(x.qid, x.golds, x.difficulty) for x in back] == [(r["extra_info"]["qid"], tuple(json.loads(r["extra_info"]["golds"])), r["extra_info"]["difficulty"]) for r in alone]

def tree(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

def test_same_settings_same_bytes(tmp_path):
    source = write_sets(tmp_path)
    args = dict(source=source, limit=10, level="hard")
    for out, kw in (("a", {}), ("b", {}), ("c", dict(seed=1))): prepare(["hotpotqa", "nq"][:1], tmp_path/out, **args | dict(source={"hotpotqa": tmp_path}) | kw)
    assert tree(tmp_path/"a") == tree(tmp_path/"b")
    qids = lambda out: [r["extra_info"]["qid"] for r in load_rl(tmp_path/out/"train.parquet")]
    assert sorted(qids("a")) == sorted(qids("c")) and qids("a") != qids("c")
    m = prepare("hotpotqa", tmp_path/"d", {"hotpotqa": tmp_path}, limit={"train": 4}, shuffle=False)
    assert [r["extra_info"]["qid"] for r in load_rl(tmp_path/"d/train.parquet")] == ["h0", "h1", "h2", "h3"] and m["sets"]["hotpotqa"]["test"]["questions"] == 2
    longer = [r["extra_info"]["qid"] for r in load_rl(Path(prepare("hotpotqa", tmp_path/"e", {"hotpotqa": tmp_path}, limit=20) and tmp_path/"e/hotpotqa/train/rl.parquet"))]
    shorter = [r["extra_info"]["qid"] for r in load_rl(Path(prepare("hotpotqa", tmp_path/"f", {"hotpotqa": tmp_path}, limit=5) and tmp_path/"f/hotpotqa/train/rl.parquet"))]
    assert longer[:5] == shorter                                                # a larger sample contains the smaller one

def test_filters_and_shared_questions(tmp_path):
    source = {"hotpotqa": write_sets(tmp_path)["hotpotqa"]}
    m = prepare("hotpotqa", tmp_path/"o", source, level=("hard",), kind="compar", splits="train")
    rows = load_rl(tmp_path/"o/train.parquet")
    assert {(r["extra_info"]["difficulty"], r["extra_info"]["kind"]) for r in rows} == {("hard", "comparison")} and len(rows) == 5 == m["sets"]["hotpotqa"]["train"]["left"]
    assert "easy, hard, medium" in told(prepare, "hotpotqa", tmp_path/"p", source, level="harder") and "hops 2" in told(prepare, "hotpotqa", tmp_path/"p", source, hops=3)
    assert "1 training questions are copies of test questions" in told(prepare, "hotpotqa", tmp_path/"p", source, shared="refuse")
    assert not (tmp_path/"p").exists()
    assert prepare("hotpotqa", tmp_path/"p", source, shared="keep")["sets"]["hotpotqa"]["train"] | dict(shared_with_test=1, shared_left_out=0, left=31) == \
        json.loads((tmp_path/"p/manifest.json").read_text())["sets"]["hotpotqa"]["train"]
    for kw, said in ((dict(limit=0), "limit=0"), (dict(shared="x"), "drop"), (dict(splits="dev"), "train"), (dict(profile="none"), "unknown profile")):
        assert said in told(prepare, ["hotpotqa", "miniweb"], tmp_path/"z", source, **kw)

# recipes

def test_the_released_recipe_is_what_rag_data_does(tmp_path):
    import datasets
    rows = [dict(id=f"train_{i}", question=f"What is number {i}?", golden_answers=[f"N{i}", "second"], metadata=dict(level=("hard", "easy", "hard", "medium")[i % 4], type="bridge"))
            for i in range(10_500)]
    (tmp_path/"train.jsonl").write_bytes(jsonl(rows))
    prepare(recipe="webseer-released", folder=tmp_path/"o", source=[f"hotpotqa-flashrag={tmp_path}/train.jsonl"])
    wanted = [dict(seed=i) for i in range(501, 10000) if rows[i]["metadata"]["level"] == "hard"]
    parts = datasets.Dataset.from_list(wanted).train_test_split(train_size=int(0.8 * len(wanted)), shuffle=True, seed=42)
    for split in SPLITS:
        made = load_rl(tmp_path/f"o/{split}.parquet")
        assert [r["prompt"][1]["content"] for r in made] == [rows[r["seed"]]["question"] for r in parts[split]]
        assert [json.loads(r["reward_model"]["ground_truth"]) for r in made] == [rows[r["seed"]]["golden_answers"][:1] for r in parts[split]]
    assert "10,000 rows" in told(released_rows, load_set("hotpotqa-flashrag", "train", tmp_path/"train.jsonl")[0][:100])
    assert json.loads((tmp_path/"o/manifest.json").read_text())["recipe"] == "webseer-released"

def test_recipes_say_what_is_unknown(tmp_path):
    assert "unknown" in told(prepare, recipe="webseer-paper", folder=tmp_path/"o") and "did you mean" in told(prepare, recipe="webseer-release", folder=tmp_path/"o")
    assert set(RECIPES["webseer-eval"].sets) <= set(SETS) and not (tmp_path/"o").exists()

# the mini-web and verl's rows

def test_miniweb_asks_what_chapters_10_and_11_ask(monkeypatch):
    from webseer import rl
    asked = {}
    monkeypatch.setattr(rl, "ModelPolicy", lambda *a, **k: None)
    monkeypatch.setattr(rl, "rollouts", lambda policy, jobs, budget: asked.update(jobs=jobs))
    monkeypatch.setattr(rl, "run_sync", lambda x: [])
    for step in (0, 3):
        rl.gather(None, None, SMOKE, 5, "srrl", step)
        assert list(dict.fromkeys(j[1] for j in asked["jobs"])) == rl_questions_of_step(SMOKE, 5, step)
    test, facts = miniweb_questions(SMOKE, "test", limit=30)
    assert [x.text for x in test] == [x.text for i in range(2) for x in world_of_test(SMOKE, i)[2]] and facts["worlds"] == 2
    assert {x.world for x in miniweb_questions(SMOKE, "train", 5, limit=5)[0]} == {"rl-5-0", "rl-5-1"}

def test_miniweb_is_the_default_set(tmp_path):
    m = prepare(folder=tmp_path, profile="smoke", limit=6)
    rows = load_rl(tmp_path/"train.parquet")
    assert m["sets"]["miniweb"]["train"]["profile"] == "smoke" and len(rows) == 6 and {r["extra_info"]["retrieval"] for r in rows} == {f"w/rl-0-{i}" for i in (0, 1)}
    assert rows[0]["prompt"] == first_messages(rows[0]["prompt"][1]["content"], TOOLS) and all(r["extra_info"]["world"].startswith("test-") for r in load_rl(tmp_path/"test.parquet"))

def nulls(column):
    "Null values at any depth of a column."
    if isinstance(column, pa.ChunkedArray): return sum(map(nulls, column.chunks))
    deep = sum(map(nulls, column.flatten())) if pa.types.is_struct(column.type) else nulls(column.values) if pa.types.is_list(column.type) else 0
    return column.null_count + deep

def test_rows_come_back_as_they_were_and_without_nulls(tmp_path):
    qs = [SetQuestion("a", "Who?", ("Ä", "b\"c"), 2, "bridge", (), None, "hard", "hotpotqa"), SetQuestion("", "Où?", ("x",), 0, "", (), 7, source="miniweb")]
    rows = rl_rows(qs, "train", "w/{world}")
    save_rl(tmp_path/"x.parquet", rows)
    assert load_rl(tmp_path/"x.parquet") == rows
    t = pq.read_table(tmp_path/"x.parquet")
    assert {c: nulls(t[c]) for c in t.column_names} == dict.fromkeys(t.column_names, 0)
    assert rows[0]["prompt"] == first_messages("Who?", WEB_TOOLS) and rows[1]["prompt"][0]["content"] == system_text(TOOLS)
    assert rl_question(load_rl(tmp_path/"x.parquet")[0]) == SetQuestion(**{**vars(qs[0]), "split": "train"}) and rows[1]["extra_info"]["world"] == "7"
    assert rows[1]["extra_info"]["tools_kwargs"]["execute_python"]["create_kwargs"] == dict(golds='["x"]', retrieval="w/7", split="train") and rows[0]["extra_info"]["retrieval"] == ""
    assert rows[0]["extra_info"]["tools_kwargs"]["submit_answer"]["create_kwargs"]["golds"] == '["Ä", "b\\"c"]' == rows[0]["reward_model"]["ground_truth"]
    for spoil, said in ((lambda r: r.pop("prompt"), "row 1: no field prompt"), (lambda r: r["extra_info"].update(golds="x"), "row 1, field extra_info: the field golds"),
                        (lambda r: r["extra_info"].pop("qid"), "no field qid"), (lambda r: r.update(prompt=[]), "the field prompt")):
        bad = json.loads(json.dumps(rows[0]))
        spoil(bad)
        pq.write_table(pa.Table.from_pylist([bad]), tmp_path/"bad.parquet")
        assert said in told(load_rl, tmp_path/"bad.parquet")
    assert "form of rl_rows" in told(save_rl, tmp_path/"bad2.parquet", [dict(rows[0], prompt=7)]) and not (tmp_path/"bad2.parquet").exists()

# conversations

def call(name, **a): return dict(id="0", type="function", function=dict(name=name, arguments=json.dumps(a)))
def traj(i=0, calls=2, question=None):
    ms = first_messages(question or f"Who owns hall {i}?") + [
        dict(role="assistant", content="I look.", tool_calls=[call("search", query=f"hall {i}"), call("query_on_page", url="u", question="Who?")][:calls])]
    ms += [dict(role="tool", tool_call_id="0", name="search", content=f"found {j}") for j in range(calls)]
    ms += [dict(role="assistant", content="", tool_calls=[call("submit_answer", answer=f"Ada {i}")])]
    return Traj(ms[1]["content"], [f"Ada {i}"], f"q{i}", 2, None, ms, calls=["search"], stop="submitted", tools=list(TOOLS),
                meta=dict(sample=0, rule="paper", rounds=2, verified=1, proposals=[], verdicts=[]))

def test_all_our_forms_give_the_same_rows(tmp_path):
    ts = [traj(i) for i in range(4)]
    save_sft(tmp_path/"sft.parquet", [t.to_dict() for t in ts])
    save_text(tmp_path/"text.parquet", [t.to_dict() for t in ts])
    save_trajs(tmp_path/"world000.jsonl", ts)
    rows = sft_rows(ts)
    assert rows == sft_rows(tmp_path/"sft.parquet") == sft_rows(tmp_path/"text.parquet") == sft_rows(tmp_path/"world000.jsonl") == sft_rows(tmp_path)
    assert [m["role"] for m in rows[0]["messages"]] == ["system", "user", "assistant", "tool", "assistant"] and rows[0]["rounds"] == 2
    assert rows[0]["messages"][3]["content"] == "found 0\n</tool_response>\n<tool_response>\nfound 1"
    assert rows[0]["messages"][2]["content"] == "I look." + call_text("search", query="hall 0") + call_text("query_on_page", url="u", question="Who?")
    one = traj(9, calls=1)
    assert render(sft_rows([one])[0]["messages"]) == render(one.messages)

def test_nulls_of_arrow_are_not_taught(tmp_path):
    ms = [dict(role="system", content="x"), dict(role="user", content="Question: Who?"),
          dict(role="assistant", content="", tool_calls=[dict(type="function", function=dict(name="search", arguments=dict(query="a")))]), dict(role="tool", content="b"),
          dict(role="assistant", content="", tool_calls=[dict(type="function", function=dict(name="submit_answer", arguments=dict(answer="c")))])]
    pq.write_table(pa.Table.from_pylist([dict(messages=ms, tools=TOOLS)]), tmp_path/"x.parquet")
    assert "None" in str(pq.read_table(tmp_path/"x.parquet").to_pylist()[0]["messages"][2])          # the trap
    row, = sft_rows(tmp_path/"x.parquet")
    assert row["messages"] == first_messages("Who?", TOOLS) + [dict(role="assistant", content=call_text("search", query="a")), dict(role="tool", content="b"),
                                                               dict(role="assistant", content=call_text("submit_answer", answer="c"))]

def released(question, *turns): return dict(messages=json.dumps([dict(role="system", content="You are a reasoning assistant. /no_think"), dict(role="user", content=f"Question: {question}"), *turns]), tools=TOOLS)
def test_the_published_conversations(tmp_path):
    said = dict(role="assistant", content=None, tool_calls=[call("search", query="a")], reasoning="\n\n")
    hits = dict(tool_call_id="1", role="tool", name="search", content="1. Title: a")
    end = dict(role="assistant", content="So the answer is c", tool_calls=[dict(id="2", type="function", function=dict(name="submit_answer", arguments='"{\\"answer\\": \\"c\\"}"'))])
    pq.write_table(pa.Table.from_pylist([released("Who?", said, hits, end, dict(hits, name="submit_answer", content="Correct!", signal=True)),
                                         released("Where?", dict(role="assistant", content="No call.", tool_calls=[]), dict(role="user", content="Please use the provided tools."), end)]), tmp_path/"train.parquet")
    a, b = sft_rows(tmp_path)
    assert a["messages"] == first_messages("Who?", TOOLS) + [dict(role="assistant", content=call_text("search", query="a")), dict(role="tool", content="1. Title: a"),
                                                             dict(role="assistant", content="So the answer is c" + call_text("submit_answer", answer="c"))]
    assert [m["role"] for m in b["messages"]] == ["system", "user", "assistant", "user", "assistant"]

@pytest.mark.parametrize("messages, said", [
    ("nonsense", "the field messages is no JSON list"), ([], "no list"), ([dict(role="user", content="Who?")], "no question"), ([dict(role="system", content=""), dict(role="user", content="Who?")], "no question"),
    ([dict(role="user", content="Who?"), dict(role="robot", content="x")], "message 1: the field role is 'robot'"), ([dict(role="user", content="Who?"), dict(content="x")], "message 1: no field role"),
    ([dict(role="user", content="Who?"), dict(role="assistant", content=["x"])], "message 1: the field content is no text"), ([dict(role="user", content="Who?"), dict(role="tool", content="x")], "no reply"),
    ([dict(role="user", content="Who?"), dict(role="assistant", content="", tool_calls=[dict(function=dict(name="search", arguments="{"))])], "message 1: the field tool_calls"),
    ([dict(role="user", content="Who?"), dict(role="assistant", content=""), dict(role="system", content="x")], "message 2: the field role is system")])
def test_wrong_conversations(messages, said, tmp_path):
    pq.write_table(pa.Table.from_pylist([released("Who?", dict(role="assistant", content="x")), dict(messages=messages if isinstance(messages, str) else json.dumps(messages), tools=TOOLS)]), tmp_path/"x.parquet")
    text = told(sft_rows, tmp_path/"x.parquet")
    assert text.startswith(f"{tmp_path}/x.parquet, row 2") and said in text

def test_held_out_questions_are_not_trained_on(tmp_path):
    ts = [traj(i) for i in range(12)] + [traj(i, calls=1) for i in range(6)] + [traj(3)]
    m = prepare_sft(ts, tmp_path/"a", test=.25)
    parts = {s: pq.read_table(tmp_path/f"a/{s}.parquet").to_pylist() for s in SPLITS}
    asked = {s: {r["question"] for r in rows} for s, rows in parts.items()}
    assert not asked["train"] & asked["test"] and len(asked["test"]) == 3 and sum(map(len, parts.values())) == 18 and (m["rows"], m["copies"], m["questions"]) == (19, 1, 12)
    assert set(pq.read_table(tmp_path/"a/train.parquet").column_names) == {"messages", "question", "golds", "qid", "rounds"}
    prepare_sft(ts, tmp_path/"b", test=.25)
    assert tree(tmp_path/"a") == tree(tmp_path/"b")
    assert "two are needed" in told(prepare_sft, ts[:1], tmp_path/"c") and "share" in told(prepare_sft, ts, tmp_path/"c", test=1) and not (tmp_path/"c").exists()

# the hub: the real datasets library against a hub on loopback

COMMIT = "a" * 40
def hub_app(repos):
    "What the hub's client asks for: files of a revision, and the list of them."
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
    async def answer(request):
        path = request.url.path
        if path == "/": return Response("hub")
        for name, files in repos.items():
            api, tree_, resolve = (f"/api/datasets/{name}", f"/api/datasets/{name}/tree/", f"/datasets/{name}/resolve/")
            if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"): return JSONResponse(dict(id=name, sha=COMMIT, siblings=[dict(rfilename=f) for f in files], tags=[]))
            if path.startswith(tree_):
                at = path.removeprefix(tree_).partition("/")[2]
                found = [f for f in files if not at or f.startswith(at + "/")]
                dirs = {f.rsplit("/", 1)[0] for f in found if "/" in f} - {at}
                return JSONResponse([dict(type="file", path=f, size=len(files[f]), oid=hashlib.sha1(files[f]).hexdigest()) for f in found] + [dict(type="directory", path=d, size=0, oid="0") for d in dirs])
            if path.startswith(resolve) and (data := files.get(path.removeprefix(resolve).partition("/")[2])) is not None:
                return Response(data if request.method == "GET" else b"", headers={"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(data))})
            if path.startswith(resolve): return JSONResponse({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        return JSONResponse({}, 404, {"X-Error-Code": "RepoNotFound"})
    return Starlette(routes=[Route("/{rest:path}", answer, methods=["GET", "HEAD", "POST"])])

SFT_ROW = dict(messages=json.dumps([dict(role="system", content="Reason."), dict(role="user", content="Question: Who owns Blue Hall?"), dict(
    role="assistant", content="Ada Vel.", tool_calls=[dict(id="1", type="function", function=dict(name="submit_answer", arguments=dict(answer="Ada Vel")))])]), tools="[]")
CHILD = """
import json, sys
from webseer.core import WebseerError
from webseer.questions import load_set, sft_rows
for _ in range(2):
    for name, split in (("hotpotqa", "train"), ("fanoutqa", "test"), ("musique", "train")):
        try:
            qs, facts = load_set(name, split)
            print(json.dumps([[(q.qid, q.golds, q.hops, q.difficulty) for q in qs], facts]), flush=True)
        except WebseerError as e: print(json.dumps(str(e)), flush=True)
    print(json.dumps(sft_rows("webseer-sft")), flush=True)
    print("---", flush=True)
    sys.stdin.readline()
"""

def test_the_hub_its_cache_and_no_hub(tmp_path):
    card = b"---\nconfigs:\n- config_name: distractor\n  data_files:\n  - split: train\n    path: distractor/train-*\n---\n"
    repos = {"hotpotqa/hotpot_qa": {"README.md": card, "distractor/train-00000-of-00001.parquet": parquet([dict(HUB_HOTPOT, id=str(i)) for i in range(3)])},
             "99hgz/WebSeer-sft-dataset": {"README.md": b"", "data/train-00000-of-00001.parquet": parquet([SFT_ROW])},
             "zhuexe/fanoutqa": {"README.md": b"", "fanout-final-dev.json": listed([DEV, dict(DEV, id="cd34", answer=["a", 1])])}}
    def block(): return list(iter(lambda: child.stdout.readline().strip(), "---"))
    with running_app(hub_app(repos)) as url:
        env = os.environ | dict(HF_ENDPOINT=url, HF_HOME=str(tmp_path), HF_UPDATE_DOWNLOAD_COUNTS="false", HF_HUB_DISABLE_TELEMETRY="1", PYTHONPATH=os.getcwd())
        child = subprocess.Popen([sys.executable, "-c", CHILD], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try: first = [json.loads(l) for l in block()]
        except BaseException: child.kill(); raise
    child.stdin.write("\n"); child.stdin.flush()                                # now the hub is gone
    second = [json.loads(l) for l in block()]
    child.communicate("\n", timeout=20)
    assert first[0] == [[[str(i), ["Ada Vel"], 2, "hard"] for i in range(3)], dict(hub="hotpotqa/hotpot_qa", config="distractor", split="train", revision=None, commit=COMMIT, rows=3, without_answer=0)]
    assert [x[0] for x in first[1][0]] == ["ab12", "cd34"] and first[1][0][1][1] == ["a, 1"]
    assert "the hub has no dgslibisey/MuSiQue" in first[2] and "--file musique:train=PATH" in first[2]
    assert second[0][0] == first[0][0] and second[1] == first[1]                # out of the cache
    assert [m["role"] for m in first[3][0]["messages"]] == ["system", "user", "assistant"] and second[3] == first[3]
    assert "musique: the hub cannot be reached" in second[2] and "github.com/StonyBrookNLP/musique" in second[2] and "--file musique:train=PATH and musique:test=PATH" in second[2]

# verl itself, where it is installed

VERL = os.environ.get("WEBSEER_VERL") or (".venv-verl/bin/python" if Path(".venv-verl/bin/python").is_file() else "")
CHECK = """
import json, sys
from omegaconf import OmegaConf
from transformers import AutoTokenizer
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset
from verl.utils.dataset.rl_dataset import RLHFDataset
d = sys.argv[1]
tok = AutoTokenizer.from_pretrained(d + '/model')
tok.chat_template = tok.chat_template.replace('"" if loop.first else', '"" if m.role == "system" else')   # verl renders message by message
ds = MultiTurnSFTDataset(d + '/sft/train.parquet', tok, OmegaConf.create(dict(pad_mode='no_padding', max_length=8192, truncation='error')))
sft = [(ds[i]['input_ids'].tolist(), ds[i]['loss_mask'].tolist()) for i in range(len(ds))]
rl = RLHFDataset(d + '/rl/train.parquet', tok, OmegaConf.create(dict(max_prompt_length=4096, filter_overlong_prompts=True, filter_overlong_prompts_workers=1, cache_dir=d + '/cache')))
json.dump([sft, [dict(rl[i]['tools_kwargs'], prompt=rl[i]['raw_prompt'], index=rl[i]['index']) for i in range(len(rl))]], open(d + '/verl.json', 'w'))
"""

@pytest.mark.skipif(not VERL, reason="needs verl: make verl, or WEBSEER_VERL=/path/to/python")
def test_verl_reads_our_files(tmp_path):
    from webseer.model import Codec, ModelConfig, Qwen2, save_checkpoint
    from webseer.sft import encode_messages
    codec = Codec()
    save_checkpoint(tmp_path/"model", Qwen2(ModelConfig.of(SMOKE, codec.n)), codec, {})
    ts = [traj(i, calls=1) for i in range(6)]
    prepare_sft(ts, tmp_path/"sft", test=.2)
    prepare("miniweb", tmp_path/"rl", limit=3, profile="smoke")
    r = subprocess.run([VERL, "-c", CHECK, str(tmp_path)], capture_output=True, text=True, env=os.environ | dict(HF_DATASETS_CACHE=str(tmp_path/"hf")))
    assert r.returncode == 0, r.stderr[-2000:]
    sft, rl = json.loads((tmp_path/"verl.json").read_text())
    by = {t.question: t for t in ts}
    ours = [encode_messages(codec, by[x["question"]].messages) for x in pq.read_table(tmp_path/"sft/train.parquet").to_pylist()]
    assert [tuple(map(list, x)) for x in sft] == [tuple(map(list, x)) for x in ours]
    rows = load_rl(tmp_path/"rl/train.parquet")
    assert [(x["prompt"], x["index"], x["search"]) for x in rl] == [(x["prompt"], x["extra_info"]["index"], x["extra_info"]["tools_kwargs"]["search"]) for x in rows]
