"""The trace in a terminal: what of a text reaches it, and an output that cannot take every character."""
import io

import pytest

from webseer.trace import SIGNS, Trace, block, fit, safe
from webseer.traj import Event, Traj


@pytest.mark.parametrize("text, shown", [("Qui\u202f?", "Qui ?"), ("10\u00a0km", "10 km"), ("東京\u3000大阪", "東京 大阪"), ("a\u2009b\u2003c\u2028d", "a b c d"), ("co\u00adop", "coop"), ("\ufeffa\u200bb\u2060c", "abc"),
    ("क्\u200dष", "क्\u200dष"), ("می\u200cخواهم", "می\u200cخواهم"), ("👩\u200d🔬", "👩\u200d🔬"), ("a\tb\r\nc", "a b\nc"),
    ("\x1b[31m", "�[31m"), ("\u202eabc\u2066\u200f", "�abc��"), ("a\x00\x07\x0b\x85\x9b\rb", "a������b"), ("\udcff", "�"), ("plain", "plain")])
def test_what_a_terminal_shows(text, shown): assert safe(text) == shown


def rollout():
    said = "Où ? 東京 “€”"
    call = lambda i, name, args: dict(id=i, type="function", function=dict(name=name, arguments=args))
    return Traj("Où est-ce ?", ["東京"], messages=[dict(role="system", content="s"), dict(role="user", content="Où est-ce ?"),
        dict(role="assistant", content=said, tool_calls=[call("0", "search", '{"query": "東京"}')]), dict(role="tool", tool_call_id="0", name="search", content=said),
        dict(role="assistant", content="", tool_calls=[call("1", "submit_answer", '{"answer": "東京"}')])], calls=["search", "submit_answer"], stop="submitted", submissions=[dict(answer="x", em=0.)])


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii", "latin-1", "cp437", "shift_jis", "utf-16"])
def test_an_output_that_is_not_utf8(encoding):
    "A rollout is never lost because its words cannot be written."
    from rich.console import Console
    out = io.TextIOWrapper(raw := io.BytesIO(), encoding=encoding, write_through=True)
    for terminal in (False, True):
        trace = Trace(Console(file=out, width=100, highlight=False, force_terminal=terminal))
        t = rollout()
        stop, t.stop = t.stop, ""
        trace(t)
        trace.on_text(t, "Où 東京 ▸")
        t.stop = stop
        trace(t)
    text = raw.getvalue().decode(encoding)
    assert "est-ce ?" in text and "search" in text and "submit_answer" in text and "wrong (accepted: " in text
    if encoding == "utf-8": assert "▸ search  query: 東京" in text and "■ submit" in text
    if encoding == "cp1252": assert "… Où ? ?? “€”" in text and "> search  query: ??" in text and "* submit_answer" in text
    if encoding == "ascii": assert ". O? ? ?? ???" in text and "? O? est-ce ?" in text


def test_signs_stay_apart_without_their_characters():
    for encoding in ("ascii", "cp1252", "latin-1"): assert len({fit(sign, encoding) for sign, _ in SIGNS.values()}) == len(SIGNS)
    assert block(Event("thought", "model", "Où\u202f?")).plain == "… Où ?"
