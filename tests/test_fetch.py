"webseer.fetch: which addresses are refused and why, and what hostile servers can do to a reader of pages."
import asyncio
import contextlib
import datetime
import email.utils
import gzip
import ipaddress
import os
import pickle
import re
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import zlib
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.responses import PlainTextResponse

from webseer.core import WebseerError
from webseer.fetch import (PORTS, TYPES, USER_AGENT, Fetcher, Limits, Refused, Unpacker, _guarded_transport, check_url, content_type, kind_of, not_public,
                           resolve)
from webseer.remote import DeadlineExceeded, Transient, running_app
from webseer.retrieval import PageNotFound

# ---------------------------------------------------------------------------------------------------------------- addresses

LOOP, PRIVATE, LINK, META, MULTI, RESERVED = "loopback", "private", "link-local", "metadata", "multicast", "reserved"
SPELT, LOCAL, PORT = "unusual spelling", "local network", "is none of 80"

REFUSED = [
    # plain IPv4
    ("http://127.0.0.1/", LOOP), ("http://127.0.0.1:80/", LOOP), ("https://127.0.0.1/", LOOP), ("http://127.0.0.2/", LOOP), ("http://127.255.255.255/", LOOP),
    ("http://127.1.2.3:8080/admin", LOOP), ("http://10.0.0.1/", PRIVATE), ("http://10.255.255.255/", PRIVATE), ("http://172.16.0.1/", PRIVATE),
    ("http://172.31.255.255/", PRIVATE), ("http://192.168.0.1/", PRIVATE), ("http://192.168.1.254/", PRIVATE), ("http://192.168.255.255/", PRIVATE),
    ("http://169.254.0.1/", LINK), ("http://169.254.170.2/v2/credentials", LINK), ("http://169.254.169.254/", META), ("http://169.254.169.254/latest/meta-data/", META),
    ("http://168.63.129.16/", META), ("http://100.100.100.200/latest/meta-data/", META), ("http://192.0.0.192/", META), ("http://100.64.0.1/", "CGNAT"),
    ("http://100.127.255.255/", "CGNAT"), ("http://0.0.0.0/", "unspecified"), ("http://0.0.0.0:8080/", "unspecified"), ("http://0.1.2.3/", "this network"),
    ("http://224.0.0.1/", MULTI), ("http://239.255.255.250/", MULTI), ("http://240.0.0.1/", RESERVED), ("http://255.255.255.254/", RESERVED),
    ("http://255.255.255.255/", "broadcast"), ("http://192.0.0.8/", RESERVED), ("http://192.0.2.1/", "documentation"), ("http://198.51.100.7/", "documentation"),
    ("http://203.0.113.9/", "documentation"), ("http://198.18.0.1/", "benchmarking"), ("http://198.19.255.255/", "benchmarking"), ("http://192.88.99.1/", RESERVED),
    # other spellings of IPv4
    ("http://2130706433/", "127.0.0.1, a loopback"), ("http://0x7f000001/", "127.0.0.1, a loopback"), ("http://0x7F.0x0.0x0.0x1/", "127.0.0.1, a loopback"),
    ("http://017700000001/", "127.0.0.1, a loopback"), ("http://0177.0.0.1/", "127.0.0.1, a loopback"), ("http://0177.0.0.01/", "127.0.0.1, a loopback"),
    ("http://127.1/", "127.0.0.1, a loopback"), ("http://127.0.1/", "127.0.0.1, a loopback"), ("http://127.0.0.01/", "127.0.0.1, a loopback"),
    ("http://0x7f.1/", "127.0.0.1, a loopback"), ("http://0x7f.0.1/", "127.0.0.1, a loopback"), ("http://127.0x0.1/", "127.0.0.1, a loopback"), ("http://0/", "0.0.0.0, the unspecified"),
    ("http://0x0/", "0.0.0.0, the unspecified"), ("http://0x/", "0.0.0.0, the unspecified"), ("http://00000000/", "0.0.0.0, the unspecified"), ("http://0.0/", "0.0.0.0, the unspecified"),
    ("http://2852039166/", "169.254.169.254, a cloud metadata"), ("http://0xa9fea9fe/", "169.254.169.254, a cloud metadata"),
    ("http://0251.0376.0251.0376/", "169.254.169.254, a cloud metadata"), ("http://169.16689662/", "169.254.169.254, a cloud metadata"), ("http://3232235521/", "192.168.0.1, a private"),
    ("http://0xc0.0xa8.0.1/", "192.168.0.1, a private"), ("http://192.168.1/", "192.168.0.1, a private"), ("http://10.1/", "10.0.0.1, a private"), ("http://167772161/", "10.0.0.1, a private"),
    ("http://0x8.8.8.8/", SPELT), ("http://134744072/", SPELT), ("http://1.1/", SPELT), ("http://1.1.1.01/", SPELT), ("http://127.0.0.1./", LOOP), ("http://2130706433./", "127.0.0.1, a loopback"),
    ("http://127.0.0.1../", "no host name has"), ("http://256.0.0.1/", "no IPv4"), ("http://127.0.0.256/", "no IPv4"), ("http://4294967296/", "no IPv4"), ("http://1.2.3.4.5/", "no IPv4"),
    ("http://0x100000000/", "no IPv4"), ("http://08.8.8.8/", "no IPv4"),
    ("http://example.123/", "no IPv4"), ("http://example.0x7f/", "no IPv4"), ("http://18446744073709551617/", "no IPv4"), ("http://127.0.0.1.1/", "no IPv4"),
    # digits and dots of other scripts, percent signs
    ("http://１２７.０.０.１/", LOOP), ("http://①②⑦.⓪.⓪.①/", LOOP), ("http://127。0。0。1/", LOOP), ("http://127．0．0．1/", LOOP), ("http://１２７。０。０。１:80/", LOOP),
    ("http://𝟏𝟐𝟕.𝟎.𝟎.𝟏/", LOOP), ("http://１６９.２５４.１６９.２５４/", META), ("http://0ⓧ7f.1/", "127.0.0.1, a loopback"), ("http://ｌｏｃａｌｈｏｓｔ/", LOCAL), ("http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ/", LOCAL),
    ("http://local\u00adhost/", LOCAL), ("http://loc\u200balhost/", LOCAL), ("http://lOcALhoſt/", LOCAL), ("http://%31%32%37.0.0.1/", "percent-encoded"), ("http://127%2e0%2e0%2e1/", "percent-encoded"),
    ("http://%6c%6f%63alhost/", "percent-encoded"), ("http://127.0.0.1%00.example.org/", "percent-encoded"), ("http://example.org%2f@127.0.0.1/", "user name"),
    ("http://١٢٧.٠.٠.١/", "international"), ("http://a℀b.example/", ""), ("http://exam\ufffdple.org/", "international"),
    # IPv6
    ("http://[::1]/", LOOP), ("http://[::1]:8080/", LOOP), ("http://[0:0:0:0:0:0:0:1]/", LOOP), ("http://[0000:0000::0001]/", LOOP), ("http://[::]/", "unspecified"), ("http://[::0]:80/", "unspecified"),
    ("http://[fe80::1]/", LINK), ("http://[febf::1]/", LINK), ("http://[fe80::1%25eth0]/", "network interface"), ("http://[::1%25lo]/", "network interface"), ("http://[fc00::1]/", PRIVATE),
    ("http://[fd12:3456:789a::1]/", PRIVATE), ("http://[fd00:ec2::254]/", META), ("http://[fd20:ce::254]/", META), ("http://[fec0::1]/", "site-local"), ("http://[ff02::1]/", MULTI), ("http://[ff0e::1]/", MULTI),
    ("http://[2001:db8::1]/", "documentation"), ("http://[3fff::1]/", "documentation"), ("http://[100::1]/", RESERVED), ("http://[5f00::1]/", RESERVED), ("http://[4000::1]/", "outside the public range"),
    ("http://[2001:10::1]/", RESERVED), ("http://[2001:2::1]/", "benchmarking"), ("http://[e000::1]/", "outside the public range"), ("http://[::2:0:0]/", "outside the public range"),
    # IPv4 inside IPv6
    ("http://[::ffff:127.0.0.1]/", LOOP), ("http://[::ffff:7f00:1]/", LOOP), ("http://[::FFFF:7F00:0001]:80/", LOOP), ("http://[0:0:0:0:0:ffff:127.0.0.1]/", LOOP), ("http://[::ffff:169.254.169.254]/", META),
    ("http://[::ffff:10.0.0.1]/", PRIVATE), ("http://[::ffff:0.0.0.0]/", "unspecified"), ("http://[::ffff:224.0.0.1]/", MULTI), ("http://[::127.0.0.1]/", LOOP), ("http://[::7f00:1]/", LOOP),
    ("http://[::169.254.169.254]/", META), ("http://[::8.8.8.8]/", "IPv4-compatible"), ("http://[::ffff:0:127.0.0.1]/", LOOP), ("http://[::ffff:0:8.8.8.8]/", "IPv4-translated"),
    ("http://[64:ff9b::127.0.0.1]/", LOOP), ("http://[64:ff9b::7f00:1]/", LOOP), ("http://[64:ff9b::a9fe:a9fe]/", META), ("http://[64:ff9b::10.0.0.1]/", PRIVATE), ("http://[64:ff9b:1::808:808]/", RESERVED),
    ("http://[2002:7f00:1::]/", LOOP), ("http://[2002:a9fe:a9fe::1]/", META), ("http://[2002:c0a8:1::1]/", PRIVATE), ("http://[2002:808:808::1]/", "6to4"), ("http://[2001:0:53aa:64c:0:fbf8:80ff:fffe]/", LOOP),
    ("http://[2001::1]/", "Teredo"), ("http://[2606:4700::5efe:7f00:1]/", LOOP), ("http://[2606:4700::200:5efe:a00:1]/", PRIVATE), ("http://[2606:4700::5efe:808:808]/", "ISATAP"),
    ("http://[::1/", "cannot be read"), ("http://::1/", "cannot be read"), ("http://[::1]x/", "cannot be read"), ("http://[]/", "no IPv6"), ("http://[127.0.0.1]/", "no IPv6"), ("http://[v1.fe80::1]/", "no IPv6"),
    ("http://[::1]]/", "no IPv6"), ("http://[::g]/", "no IPv6"), ("http://[1:2:3:4:5:6:7:8:9]/", "no IPv6"), ("http://2606:4700::1111/", "cannot be read"), ("http://[::ffff:0x7f.1]/", "no IPv6"),
    # names of the local network
    ("http://localhost/", LOCAL), ("http://LOCALHOST/", LOCAL), ("http://localhost./", LOCAL), ("http://localhost:8080/", LOCAL), ("http://www.localhost/", LOCAL), ("http://a.b.localhost./x", LOCAL),
    ("http://localhost.localdomain/", LOCAL), ("http://printer.local/", LOCAL), ("http://metadata.google.internal/computeMetadata/v1/", LOCAL), ("http://metadata/", LOCAL), ("http://kubernetes.default.svc.cluster.local/", LOCAL),
    ("http://router.home.arpa/", LOCAL), ("http://nas.lan/", LOCAL), ("http://wiki.corp/", LOCAL), ("http://wiki.intranet/", LOCAL), ("http://router.home/", LOCAL), ("http://db.private/", LOCAL), ("http://fileserver/", "no dot"), ("http://com/", "no dot"),
    ("http://www_1/", "no dot"),
    # other schemes and no scheme
    ("file:///etc/passwd", "scheme is 'file'"), ("FILE:///etc/passwd", "scheme is 'file'"), ("file://localhost/etc/passwd", "scheme is 'file'"), ("ftp://ftp.example.org/", "scheme is 'ftp'"),
    ("gopher://127.0.0.1:6379/_FLUSHALL", "scheme is 'gopher'"), ("dict://127.0.0.1:11211/stat", "scheme is 'dict'"), ("ldap://example.org/", "scheme is 'ldap'"), ("ws://example.org/", "scheme is 'ws'"),
    ("javascript:alert(1)", "scheme is 'javascript'"), ("data:text/html,<p>x", "scheme is 'data'"), ("about:blank", "scheme is 'about'"), ("view-source:http://example.org/", "scheme is 'view-source'"),
    ("jar:http://example.org!/", "scheme is 'jar'"), ("blob:https://example.org/1", "scheme is 'blob'"), ("http+unix://%2Fvar%2Frun%2Fdocker.sock/", "scheme is 'http\\+unix'"), ("httpss://example.org/", "scheme is 'httpss'"),
    ("localhost:80/", "scheme is 'localhost'"), ("mailto:me@example.org", "scheme is 'mailto'"), ("ｈttp://example.org/", "scheme is"), ("://example.org/", "scheme is ''"),
    ("example.org", "no scheme"), ("www.example.org/page", "no scheme"), ("//example.org/", "no scheme"), ("/etc/passwd", "no scheme"), ("", "no scheme"), ("   ", "no scheme"), ("?", "no scheme"), ("#", "no scheme"),
    # credentials
    ("http://user:secret@example.org/", "user name"), ("http://user@example.org/", "user name"), ("http://@example.org/", "user name"), ("http://:secret@example.org/", "user name"), ("http://example.org@127.0.0.1/", "user name"),
    ("http://127.0.0.1@example.org/", "user name"), ("http://a:secret@b:secret@example.org/", "user name"), ("https://example.org:443@127.0.0.1:8080/", "user name"), ("http://good.example\\@127.0.0.1/", "user name"),
    # ports
    ("http://example.org:22/", PORT), ("http://example.org:25/", PORT), ("http://example.org:6379/", PORT), ("http://example.org:3306/", PORT), ("http://example.org:9200/", PORT), ("http://example.org:11211/", PORT),
    ("http://example.org:2375/", PORT), ("http://example.org:65535/", PORT), ("http://example.org:1/", PORT), ("http://example.org:0/", "no number from 1"), ("http://example.org:65536/", "no number from 1"),
    ("http://example.org:99999/", "no number from 1"), ("http://example.org:-80/", "no number from 1"), ("http://example.org:+80/", "no number from 1"), ("http://example.org:80x/", "no number from 1"),
    ("http://example.org: 80/", "no number from 1"), ("http://example.org:８０/", "no number from 1"), ("http://example.org:8_0/", "no number from 1"), ("http://example.org:http/", "no number from 1"),
    ("http://example.org:80:80/", "cannot be read"), ("http://example.org:100000000000000000080/", "no number from 1"), ("http://[2606:4700::1111]:22/", PORT), ("http://1.1.1.1:53/", PORT),
    # malformed
    ("http://", "names no host"), ("http:///", "names no host"), ("http:///etc/passwd", "names no host"), ("http:example.org", "names no host"), ("http:/example.org/", "names no host"), ("https:127.0.0.1", "names no host"),
    ("http:\\\\example.org/", "names no host"), ("http://?q", "names no host"), ("http://#x", "names no host"), ("http://:80/", "names no host"), ("http://./", "names no host"), ("http://../", "no host name has"),
    ("http://.example.org/", "no host name has"), ("http://a..example.org/", "no host name has"), ("http://example.org\\.evil.org/", "backslash"), ("http://127.0.0.1\\.example.org/", "backslash"), ("http://\\\\127.0.0.1/", "backslash"),
    ("http://exa mple.org/", "no host name has"), ("http://exa<b>mple.org/", "no host name has"), ("http://*.example.org/", "no host name has"), ("http://example.org,127.0.0.1/", "no host name has"),
    ("http://example.org;127.0.0.1/", "no host name has"), ("http://127.0.0.1&example.org/", "no host name has"), ("http://(127.0.0.1)/", "no host name has"), ("http://" + "a" * 64 + ".example/", "no host name has"),
    ("http://" + "a." * 127 + "example/", "longer than a name"), ("http://" + "ü" * 300 + ".example/", "longer than a name"), ("http://exam\nple.org/", "control"), ("http://example.org/\r\nHost: x", "control"), ("ht\ttp://example.org/", "control"),
    ("http://example.org/\x00", "control"), ("java\nscript://example.org/", "control"), ("http://example.org/\x7f", "control"), ("\x01http://example.org/", "control"), ("http://example.org\u0085/", "control"),
    ("http://example.org/\ud800", "surrogate"), ("http://\udfff/", "surrogate"), ("http://example.org/" + "x" * 9000, "longer than 8192"), (None, "no text"), (7, "no text"), (b"http://example.org/", "no text"), (["http://example.org/"], "no text"),
]

ACCEPTED = {  # these only look like the refused ones; where no second address is given, the first is already in its normal spelling
    "http://example.org/": None, "https://example.org/": None, "http://example.org": "http://example.org/", "HTTP://EXAMPLE.ORG/A": "http://example.org/A", "http://example.org:80/": "http://example.org/",
    "https://example.org:443/x": "https://example.org/x", "http://example.org:443/": None, "https://example.org:80/": None, "http://example.org:8080/": None, "https://example.org:8443/": None, "http://example.org:/": "http://example.org/",
    "http://example.org:0080/": "http://example.org/", "http://example.org./": "http://example.org/", " http://example.org/ \n": "http://example.org/", "http://example.org/#frag": "http://example.org/", "http://example.org?q": "http://example.org/?q",
    "http://127.0.0.1.example.org/": None, "http://127.0.0.1.nip.io/": None, "http://169.254.169.254.example.org/": None, "http://10.example.org/": None, "http://192-168-0-1.example.org/": None, "http://localhost.example.org/": None,
    "http://notlocalhost.org/": None, "http://mylocal.org/": None, "http://internal.example.org/": None, "http://metadata.google.com/": None, "http://home.example/": None, "http://thehome.org/": None, "http://0x7f.example.org/": None, "http://0.example.org/": None,
    "http://1e100.net/": None, "http://2130706433.example.org/": None, "http://dead.beef.org/": None, "http://127.0.0.0x1g/": None, "http://0xdeadbeef.org/": None, "http://a_b.example.org/": None, "http://-a-.example.org/": None, "http://xn--bcher-kva.example/": None,
    "http://bücher.example/": "http://xn--bcher-kva.example/", "http://ＥＸＡＭＰＬＥ.org/": "http://example.org/", "http://例え.jp/": "http://xn--r8jz45g.jp/", "http://faß.de/": "http://xn--fa-hia.de/", "http://www。example。org/": "http://www.example.org/",
    "http://1.1.1.1/": None, "http://8.8.8.8:8080/": None, "http://9.255.255.255/": None, "http://11.0.0.0/": None, "http://100.63.255.255/": None, "http://100.128.0.0/": None, "http://126.255.255.255/": None, "http://128.0.0.1/": None,
    "http://169.253.255.255/": None, "http://169.255.0.0/": None, "http://172.15.255.255/": None, "http://172.32.0.0/": None, "http://192.167.255.255/": None, "http://192.169.0.0/": None, "http://198.17.255.255/": None, "http://198.20.0.0/": None,
    "http://223.255.255.255/": None, "http://168.63.129.15/": None, "http://192.0.1.1/": None, "http://192.0.3.1/": None, "http://203.0.114.1/": None, "http://1.1.1.1./": "http://1.1.1.1/",
    "http://[2606:4700:4700::1111]/": None, "https://[2606:4700:4700:0:0:0:0:1111]:8443/x": "https://[2606:4700:4700::1111]:8443/x", "http://[2A00:1450::1]/": "http://[2a00:1450::1]/", "http://[2003::1]/": None, "http://[2001:4860:4860::8888]/": None,
    "http://[64:ff9b::808:808]/": None, "http://[2606:4700::5efd:7f00:1]/": None,
    "http://example.org/http://127.0.0.1/": None, "http://example.org/?url=http://169.254.169.254/": None, "http://example.org/@user": None, "http://example.org/a:b@c": None, "http://example.org/%2e%2e/%00": None,
    "http://example.org/a/../b/./c": "http://example.org/b/c", "http://example.org/.": "http://example.org/", "http://example.org/a/.": "http://example.org/a/", "http://example.org/a/b/..": "http://example.org/a/", "http://example.org/..?q": "http://example.org/?q", "http://example.org/a b": "http://example.org/a%20b", "http://example.org/ü?ü": "http://example.org/%C3%BC?%C3%BC", "http://example.org/a\\b": "http://example.org/a%5Cb",
    "http://example.org/file:///etc/passwd": None, "http://example.org//127.0.0.1/": None, "http://example.org/?a=b&a=c;d": None, "http://example.org/" + "x" * 8000: None,
}


def test_the_table_is_large(): assert len(REFUSED) >= 150 and len({repr(u) for u, _ in REFUSED}) == len(REFUSED) and len(ACCEPTED) >= 60


@pytest.mark.parametrize("url, reason", REFUSED, ids=[ascii(u)[:60] for u, _ in REFUSED])
def test_refused(url, reason):
    with pytest.raises(Refused) as e: check_url(url)
    assert re.search(reason, e.value.reason), e.value.reason
    text = str(e.value)
    assert e.value.reason in text and text.isprintable() and "secret" not in text and len(text) < 600


@pytest.mark.parametrize("url", ACCEPTED, ids=[ascii(u)[:60] for u in ACCEPTED])
def test_accepted(url):
    assert check_url(url) == (ACCEPTED[url] or url) == check_url(check_url(url))


def test_passwords_are_not_repeated():
    for url in ["http://me:hunter2@a.example/", "http:me:hunter2@a.example", "me:hunter2@a.example/x", "http://me:hun/hunter2@a.example/", "ftp://me:hunter2@a.example", "//me:hunter2@a.example", "http://me:hunter2@[::1"]:
        with pytest.raises(Refused) as e: check_url(url)
        assert "hunter2" not in str(e.value) + repr(e.value) + e.value.reason, e.value
    e = pickle.loads(pickle.dumps(e.value))
    assert isinstance(e, Refused) and e.reason and str(e)


# ------------------------------------------------------------------------------------------------------------ allow-list

@pytest.mark.parametrize("url, allow, ok", [
    ("http://127.0.0.1:8021/x", ["127.0.0.1:8021"], True), ("http://127.0.0.1:8021/x", ["127.0.0.1"], True), ("http://127.0.0.1:8021/x", "127.0.0.1:8021", True), ("http://127.0.0.1:8021/x", ["http://127.0.0.1:8021"], True),
    ("http://127.0.0.1:8022/x", ["127.0.0.1:8021"], False), ("http://127.0.0.2:8021/x", ["127.0.0.1:8021"], False), ("http://localhost:8021/", ["127.0.0.1:8021"], False), ("http://127.0.0.1/", ["localhost"], False),
    ("http://127.1:8021/", ["127.0.0.1:8021"], False), ("http://2130706433/", ["127.0.0.1"], False), ("http://[::1]:9/", ["[::1]:9"], True), ("http://[::1]:9/", ["[::1]"], True), ("http://[0:0::1]:9/", ["[::1]"], True),
    ("http://[::ffff:127.0.0.1]/", ["127.0.0.1"], False), ("http://wiki.corp/", ["WIKI.corp."], True), ("http://a.wiki.corp/", ["wiki.corp"], False), ("http://wiki.corp.example.org:22/", ["wiki.corp"], False),
    ("https://wiki/", ["wiki"], True), ("https://wiki:22/", ["wiki:443"], False), ("http://bücher.lan/", ["xn--bcher-kva.lan"], True), ("http://xn--bcher-kva.lan/", ["bücher.lan"], True),
    ("file://wiki/", ["wiki"], False), ("http://u:p@wiki/", ["wiki"], False), ("http://wiki\\x/", ["wiki"], False), ("http://example.org/", ["wiki"], True)])
def test_allow_opens_what_it_names(url, allow, ok):
    if ok: assert check_url(check_url(url, allow), allow) == check_url(url, allow)
    else:
        with pytest.raises(Refused): check_url(url, allow)


@pytest.mark.parametrize("entry", ["", "*", "*.example.org", "10.0.0.0/8", "a b", "::1", "[::1", "a:b", "a:1:2", "user@a", "0x7f.1", "http://", 7, None])
def test_bad_allow_entry(entry):
    with pytest.raises(WebseerError, match="write it like"): check_url("http://example.org/", [entry])
    with pytest.raises(WebseerError, match="write it like"): Fetcher(allow=[entry])


# ------------------------------------------------------------------------------------------------------------ properties

pieces = st.sampled_from(["http", "https", ":", "//", "/", "\\", "@", "[", "]", "::1", "::ffff:", "127.0.0.1", "0x7f", "1", "0", ".", "。", "％", "%31", "%", "localhost", "example.org", "ü", "ⓛ", "?", "#", " ", "\t", "\x00", "\ud800",
                          "8080", "xn--", "xn--a", "-", "_", "ß", "\u200d", "\u0301", "א", "ا1", "..", "&", "{", "|", "^", "'", '"', "½"])


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(), st.text(st.characters()).map(lambda t: "http://" + t), st.lists(pieces, max_size=12).map("".join), st.lists(pieces, max_size=10).map(lambda p: "http://" + "".join(p)),
                 st.tuples(st.text(max_size=12), st.text(max_size=20)).map(lambda t: f"https://{t[0]}.example.org/{t[1]}"), st.text(max_size=20).map(lambda t: f"http://example.org/{t}"),
                 st.none(), st.integers(), st.binary()))
def test_any_text_is_refused_or_normal(url):
    try: out = check_url(url)
    except Refused as e:
        assert e.reason and str(e).isprintable()
        return
    assert out.isascii() and check_url(out) == out
    a, b = urlsplit(out), httpx.URL(out)                     # three readers of addresses agree about where it leads
    assert a.scheme == b.scheme in ("http", "https") and a.hostname == b.raw_host.decode() and a.port == b.port and not a.username and not b.userinfo
    assert (b.port or {"http": 80, "https": 443}[b.scheme]) in PORTS
    with contextlib.suppress(ValueError): assert ipaddress.ip_address(a.hostname) and not not_public(a.hostname)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.integers(0, 2**32 - 1), st.sampled_from(["127.0.0.1", "10.1.2.3", "169.254.169.254", "224.0.0.5", "168.63.129.16", "0.0.0.0"]).map(lambda a: int(ipaddress.ip_address(a)))))
def test_what_an_ipv6_address_carries_is_seen(n):
    v4, hexa = ipaddress.IPv4Address(n), f"{n >> 16:x}:{n & 0xffff:x}"
    inverse = n ^ 0xffffffff
    carried = {f"::ffff:{hexa}", f"64:ff9b::{hexa}"}
    dead = {f"::{hexa}", f"::ffff:0:{hexa}", f"2002:{hexa}::1", f"2001:0:4136:e378:8000:63bf:{inverse >> 16:x}:{inverse & 0xffff:x}", f"2606:4700::5efe:{hexa}", f"2606:4700::200:5efe:{hexa}"}
    assert all(bool(not_public(a)) == bool(not_public(str(v4))) for a in carried) and all(not_public(a) for a in dead)
    if not not_public(str(v4)): assert v4.is_global           # never looser than Python
    for spelling in (str(n), hex(n), "0" + oct(n)[2:]):
        with pytest.raises(Refused): check_url(f"http://{spelling}/")


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**128 - 1) | st.integers(0, 2**125 - 1).map(lambda n: n | 1 << 125))
def test_public_ipv6_is_global(n):
    ip = ipaddress.IPv6Address(n)
    if not not_public(str(ip)): assert ip.is_global and ip in ipaddress.ip_network("2000::/3") and not ip.is_multicast


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=4000), st.lists(st.sampled_from(["gzip", "deflate"]), max_size=3), st.integers(1, 5000), st.integers(1, 700), st.binary(max_size=30))
def test_unpacking(data, codings, cap, step, tail):
    packed = data
    for c in codings: packed = gzip.compress(packed) if c == "gzip" else zlib.compress(packed)
    u = Unpacker(codings, cap)
    for i in range(0, len(packed), step):
        if not u.feed(packed[i:i + step]): break
    assert u.body == data[:cap] and u.full == (len(data) > cap) and (u.full or u.complete)
    junk = Unpacker(codings, cap)                            # arbitrary bytes and cut streams never raise
    junk.feed(tail), junk.feed(packed[:len(packed) // 2]), junk.complete, junk.damaged
    assert len(junk.body) <= cap


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.binary(max_size=60), st.sampled_from(["", *TYPES, "application/octet-stream", "image/png"]))
def test_types_never_raise(header, body, declared):
    kind, charset = content_type(header)
    assert kind == kind.lower() and kind.isascii() and (charset is None or charset.isascii()) and "/" in kind_of(declared, body)


# ------------------------------------------------------------------------------------------- a process's own internet
# Below the resolver and below connect(2) there is nothing left to fake: names are answered by a table, and chosen public
# addresses lead to servers on loopback. Everything above is what runs in earnest.

class Internet:
    def __init__(self): self.names, self.routes, self.asked, self.connected = {}, {}, [], []


@pytest.fixture
def internet(monkeypatch):
    net, connect = Internet(), socket.socket.connect

    def getaddrinfo(host, port, *a, **kw):
        with contextlib.suppress(ValueError): return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (str(ipaddress.ip_address(host)), port))]   # for the servers of the tests
        net.asked.append(host)
        answers = net.names.get(host)
        if callable(answers): answers = answers()
        if not answers: raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [(socket.AF_INET6 if ":" in a else socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in answers]

    def fake_connect(sock, address):
        net.connected.append(address[:2])
        if address[:2] not in net.routes: raise ConnectionRefusedError(111, "Connection refused")
        return connect(sock, ("127.0.0.1", net.routes[address[:2]]))
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket.socket, "connect", fake_connect)
    return net


def saying(text, log=None):
    async def app(scope, receive, send):
        if log is not None: log.append((dict(scope["headers"])[b"host"].decode(), scope["path"]))
        await PlainTextResponse(text)(scope, receive, send)
    return app


def port_of(url): return int(url.rsplit(":", 1)[1])


def get(url, limits=Limits(seconds=3, attempts=2), **kw):
    async def main():
        fetcher = Fetcher(limits, **kw)
        try: return await fetcher.get(url)
        finally: await fetcher.aclose()
    return asyncio.run(main())


PUBLIC = "93.184.215.14"


def test_a_public_site_is_reached_by_number_with_its_name(internet):
    log = []
    with running_app(saying("hello", log)) as base:
        internet.names["site.example"] = [PUBLIC]
        internet.routes = {(PUBLIC, 80): port_of(base), (PUBLIC, 8080): port_of(base)}
        got = get("http://Site.Example:80/page?x=1#part")
        assert (got.body, got.url, got.final_url, got.status, got.content_type, got.charset) == (b"hello", "http://Site.Example:80/page?x=1#part", "http://site.example/page?x=1", 200, "text/plain", "utf-8")
        get("http://site.example:8080/")
    assert log == [("site.example", "/page"), ("site.example:8080", "/")] and internet.asked == ["site.example"] * 2 and internet.connected == [(PUBLIC, 80), (PUBLIC, 8080)]


@pytest.mark.parametrize("answers, reason", [
    (["127.0.0.1"], "loopback"), (["10.1.2.3"], "private"), (["169.254.169.254"], "metadata"), (["::1"], "loopback"), (["::ffff:127.0.0.1"], "loopback"), (["fd00::1"], "private"), (["fe80::1%eth0"], "link-local"),
    (["64:ff9b::a00:1"], "private"), (["2002:7f00:1::"], "loopback"), (["0.0.0.0"], "unspecified"), (["100.64.1.1"], "CGNAT"), (["224.0.0.1"], "multicast"), (["168.63.129.16"], "metadata"),
    ([PUBLIC, "10.0.0.1"], "private"), (["10.0.0.1", PUBLIC], "private"), ([PUBLIC, "::1"], "loopback")])
def test_a_name_that_leads_inside_is_refused_without_a_knock(internet, answers, reason):
    internet.names["evil.example"] = answers
    internet.routes = {(a, 80): 1 for a in answers}
    with pytest.raises(Refused, match="evil.example resolves to") as e: get("http://evil.example/")
    assert reason in e.value.reason and internet.connected == []           # not even a connection is opened


def test_rebinding_gains_nothing(internet):
    "The first look-up is public, the next one loopback: the connection goes where the check looked, and no name is looked up twice for one connection."
    inside = []
    with running_app(saying("outside")) as out, running_app(saying("the secret", inside)) as in_:
        internet.routes = {(PUBLIC, 80): port_of(out), ("127.0.0.1", 80): port_of(in_)}
        answers = iter([[PUBLIC], ["127.0.0.1"]])
        internet.names["rebind.example"] = lambda: next(answers)
        assert get("http://rebind.example/").body == b"outside"
        assert internet.asked == ["rebind.example"] and internet.connected == [(PUBLIC, 80)]
        with pytest.raises(Refused, match="loopback"): get("http://rebind.example/")
    assert inside == [] and internet.connected == [(PUBLIC, 80)]


def test_rebinding_between_redirect_and_retry(internet):
    "A redirect to itself, or a retry, looks the name up anew and checks it anew."
    inside, tries = [], []
    async def outside(scope, receive, send):
        tries.append(scope["path"])
        if scope["path"] == "/busy": r = PlainTextResponse("", 503)
        else: r = PlainTextResponse("", 302, {"location": "http://rebind.example/next"})
        await r(scope, receive, send)
    with running_app(outside) as out, running_app(saying("the secret", inside)) as in_:
        internet.routes = {(PUBLIC, 80): port_of(out), ("127.0.0.1", 80): port_of(in_)}
        for path in ("/go", "/busy"):
            answers = iter([[PUBLIC], ["127.0.0.1"]])
            internet.names["rebind.example"] = lambda: next(answers)
            with pytest.raises(Refused, match="rebind.example resolves to 127.0.0.1"): get("http://rebind.example" + path)
    assert inside == [] and tries == ["/go", "/busy"]


def test_the_second_lock_holds_alone(internet):
    "The guarded client refuses private numbers even if everything above it forgot to check."
    inside = []
    with running_app(saying("the secret", inside)) as base:
        internet.routes = {(a, 80): port_of(base) for a in ("127.0.0.1", "::1", "10.0.0.1", "169.254.169.254")}
        async def knock(url):
            async with _guarded_transport(False, ssl.create_default_context()) as transport: await transport.handle_async_request(httpx.Request("GET", url))
        for host in ("127.0.0.1", "[::1]", "10.0.0.1", "169.254.169.254", "[::ffff:127.0.0.1]", "224.0.0.1"):
            with pytest.raises(httpx.RequestError, match="custom validation"): asyncio.run(knock(f"http://{host}/"))
    assert inside == [] and internet.connected == []


def test_next_address_is_tried(internet):
    with running_app(saying("second")) as base:
        internet.names["two.example"] = ["2606:4700::9", PUBLIC]
        internet.routes = {(PUBLIC, 80): port_of(base)}
        assert get("http://two.example/").body == b"second"
    assert internet.connected == [("2606:4700::9", 80), (PUBLIC, 80)]
    internet.connected.clear()
    internet.names["dead.example"] = [f"93.184.215.{i}" for i in range(20)]
    with pytest.raises(Transient, match="nothing answers"): get("http://dead.example/", Limits(seconds=3, attempts=1))
    assert len(internet.connected) == 4


def test_names_without_answer(internet, monkeypatch):
    with pytest.raises(WebseerError, match="none.example: no address is known"): get("http://none.example/")
    assert internet.asked == ["none.example"]                 # not retried
    def later(*a, **kw): raise socket.gaierror(socket.EAI_AGAIN, "again")
    monkeypatch.setattr(socket, "getaddrinfo", later)
    with pytest.raises(Transient, match="online"): get("http://none.example/")
    def slow(*a, **kw): time.sleep(0.8)
    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with pytest.raises(DeadlineExceeded): get("http://slow.example/", Limits(seconds=0.2))


def test_allowed_name_may_be_private_but_only_that_one(internet):
    with running_app(saying("wiki")) as base:
        internet.names = {"wiki.corp": ["10.0.0.5"], "other.example": ["10.0.0.5"]}
        internet.routes = {("10.0.0.5", 8000): port_of(base), ("10.0.0.5", 80): port_of(base)}
        assert get("http://wiki.corp:8000/", allow=["wiki.corp:8000"]).body == b"wiki"
        for url in ("http://wiki.corp/", "http://other.example/", "http://10.0.0.5:8000/"):
            with pytest.raises(Refused): get(url, allow=["wiki.corp:8000"])


def test_proxies_and_netrc_are_not_used(internet, monkeypatch, tmp_path):
    seen, proxied = [], []
    (tmp_path / ".netrc").write_text("machine site.example login me password hunter2\n")
    async def headers(scope, receive, send):
        seen.append({k.decode(): v.decode() for k, v in scope["headers"]})
        await PlainTextResponse("direct")(scope, receive, send)
    with running_app(headers) as base, running_app(saying("by proxy", proxied)) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"): monkeypatch.setenv(name, proxy)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
        internet.names["site.example"] = [PUBLIC]
        internet.routes = {(PUBLIC, 80): port_of(base), ("127.0.0.1", port_of(proxy)): port_of(proxy)}
        assert get("http://site.example/").body == b"direct" and not proxied
    (h,) = seen
    assert h["accept-encoding"] == "gzip, deflate" and h["user-agent"] == USER_AGENT and "webseer" in USER_AGENT and "Mozilla" not in USER_AGENT
    assert "authorization" not in h and "cookie" not in h and h["host"] == "site.example"


# ---------------------------------------------------------------------------------------------------------------- TLS

@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    "An authority of our own and a certificate for good.example signed by it."
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    folder, now = tmp_path_factory.mktemp("tls"), datetime.datetime.now(datetime.timezone.utc)

    def make(name, issuer, key, signer, extension):
        return (x509.CertificateBuilder().subject_name(name).issuer_name(issuer).public_key(key.public_key()).serial_number(x509.random_serial_number())
                .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1)).add_extension(extension, True).sign(signer, hashes.SHA256()))
    def named(n): return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, n)])
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = make(named("Test CA"), named("Test CA"), ca_key, ca_key, x509.BasicConstraints(True, None))
    cert = make(named("good"), named("Test CA"), key, ca_key, x509.SubjectAlternativeName([x509.DNSName("good.example")]))
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(ca.public_bytes(pem))
    (folder / "site.pem").write_bytes(cert.public_bytes(pem) + key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return folder


def test_certificates_are_checked_against_the_name(internet, certificates, monkeypatch):
    names = []
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificates / "site.pem")
    tls.sni_callback = lambda sock, name, ctx: names.append(name)
    with Site({"/": page(b"<p>secure")}, tls=tls) as site:
        internet.names = {"good.example": [PUBLIC], "evil.example": [PUBLIC]}
        internet.routes = {(PUBLIC, 443): site.port}
        with pytest.raises(WebseerError, match="certificate is not valid") as e: get("https://good.example/")     # an unknown authority
        assert not isinstance(e.value, Transient) and names == ["good.example"]
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca.pem"))
        assert get("https://good.example/").body == b"<p>secure"
        with pytest.raises(WebseerError, match="certificate is not valid"): get("https://evil.example/")          # a known authority, another name
        internet.routes = {(PUBLIC, 80): site.port}
        with pytest.raises(WebseerError): get("http://good.example/")                                             # TLS where plain HTTP was expected
    with running_app(saying("plain")) as base:
        internet.routes = {(PUBLIC, 443): port_of(base)}
        with pytest.raises(WebseerError, match="secure connection") as e: get("https://good.example/")
        assert not isinstance(e.value, Transient)
    assert names == ["good.example", "good.example", "evil.example"]


# ------------------------------------------------------------------------------------------------------- a hostile site

class Site:
    "A server on loopback that answers each path with raw bytes or whatever a coroutine writes; runs in a thread of its own."
    def __init__(self, pages, tls=None): self.pages, self.tls, self.requests, self.sent, self.now, self.most = pages, tls, [], 0, 0, 0

    async def _serve(self, reader, writer):
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            path = head.split()[1].decode()
            self.requests.append((path, head.decode("latin-1")))
            answer = self.pages[path.split("?")[0]] if path.split("?")[0] in self.pages else page(b"", status="404 Not Found")
            if isinstance(answer, list): answer = answer.pop(0) if len(answer) > 1 else answer[0]
            if isinstance(answer, bytes): await self.send(writer, answer)
            else: await answer(self, writer)
            if not writer.transport.is_closing() and writer.can_write_eof(): writer.write_eof()
        except (OSError, asyncio.IncompleteReadError): pass
        finally:
            self.now -= 1
            writer.close()

    async def send(self, writer, data):
        writer.write(data)
        self.sent += len(data)
        await writer.drain()

    def count(self, path): return sum(p == path for p, _ in self.requests)

    def __enter__(self):
        self.loop, ready = asyncio.new_event_loop(), threading.Event()
        async def main():
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls)
            self.port, self.stop = server.sockets[0].getsockname()[1], asyncio.Event()
            ready.set()
            await self.stop.wait()
            server.close()
            for t in asyncio.all_tasks() - {asyncio.current_task()}: t.cancel()
            await asyncio.sleep(0.01)
        self.thread = threading.Thread(target=lambda: self.loop.run_until_complete(main()), daemon=True)
        self.thread.start()
        assert ready.wait(5)
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *exc):
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join(5)
        self.loop.close()


def page(body=b"", kind="text/html", status="200 OK", length=True, **headers):
    "A whole answer as bytes."
    lines = [f"HTTP/1.1 {status}", *([f"Content-Type: {kind}"] if kind else []), *([f"Content-Length: {len(body)}"] if length else []), *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items()), "Connection: close"]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def go(to, status="302 Found"): return page(b"", status=status, location=to)


def forever(piece, pause=0.0, head=page(length=False)):
    "Writes a head and then the same piece again and again."
    async def write(site, writer):
        await site.send(writer, head)
        while not writer.is_closing():
            await site.send(writer, piece)
            await asyncio.sleep(pause)
    return write


def reset(data):
    "Sends some bytes and then resets the connection."
    async def write(site, writer):
        await site.send(writer, data)
        await asyncio.sleep(0.05)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    return write


TEXT = b"<p>" + b"some words of a page " * 2000
GZ = gzip.compress(os.urandom(3000).hex().encode() + TEXT)
QUICK = Limits(max_bytes=100_000, seconds=5.0, attempts=2, redirects=3)


def fetch(site, path, limits=QUICK, **kw): return get(site.url + path, limits, allow=kw.pop("allow", f"127.0.0.1:{site.port}"), **kw)


def told(site, path, limits=QUICK, **kw):
    with pytest.raises(WebseerError) as e: fetch(site, path, limits, **kw)
    assert str(e.value).isprintable() and len(str(e.value)) < 700
    return e.value


def until(condition):
    "Wait for what a server's thread will notice soon."
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end: time.sleep(0.01)
    assert condition()


@contextlib.contextmanager
def within(seconds):
    t0 = time.monotonic()
    yield
    assert time.monotonic() - t0 < seconds


def test_large_page_stops_at_the_cap():
    async def huge(site, writer):
        await site.send(writer, page(length=False, content_length=50_000_000))
        for _ in range(800): await site.send(writer, b"x" * 62500)
    with Site({"/huge": huge, "/exact": page(b"x" * 100_000), "/over": page(b"x" * 100_001)}) as site:
        got = fetch(site, "/huge")
        assert len(got.body) == 100_000 and got.truncated and got.note == "cut at 100000 bytes" and got.received < 300_000
        time.sleep(0.05)
        assert site.sent < 20_000_000                           # the connection was closed, not read to its end
        assert not fetch(site, "/exact").truncated and fetch(site, "/over").truncated and len(fetch(site, "/over").body) == 100_000


@pytest.mark.parametrize("answer, unpacks_to_nothing", [
    (forever(b"1000\r\n" + b"x" * 4096 + b"\r\n", head=page(length=False, transfer_encoding="chunked")), False), (forever(b"<p>and on " * 100), False),
    (forever(gzip.compress(b"x" * 100), head=page(length=False, content_encoding="gzip")), False),
    (forever(b"\x00\x00\x00\xff\xff" * 2000, head=page(length=False, content_encoding="deflate") + b"\x78\x9c"), True)], ids=["chunked", "plain", "gzip members", "empty blocks"])
def test_endless_stream_stops_at_the_cap(answer, unpacks_to_nothing):
    with Site({"/": answer}) as site, within(20):
        got = fetch(site, "/", Limits(max_bytes=50_000, seconds=5.0))
        assert len(got.body) == (0 if unpacks_to_nothing else 50_000) and got.truncated and got.note == "cut at 50000 bytes"


def test_slow_pages_end_at_the_deadline():
    async def silent(site, writer): await asyncio.sleep(30)
    pages = {"/drip-head": forever(b"x", 0.05, b"HTTP/1.1 200 OK\r\nX-Slow: "), "/drip-body": forever(b"<", 0.05), "/silent": silent, "/continue": forever(b"HTTP/1.1 100 Continue\r\n\r\n", 0.001, b""),
             "/drip-headers": forever(b"X-A: b\r\n", 0.05, b"HTTP/1.1 200 OK\r\n"), "/nothing-unpacked": forever(b"\x00\x00\x00\xff\xff", 0.01, page(length=False, content_encoding="deflate") + b"\x78\x9c")}
    with Site(pages) as site:
        for path in pages:
            with within(20): assert isinstance(told(site, path, Limits(seconds=0.3, attempts=3)), DeadlineExceeded), path
            assert site.count(path) == 1
        until(lambda: site.now <= 1)                            # only the silent page still sleeps: the others noticed that we left
    with pytest.raises(Refused): get("http://127.0.0.1:9/")


def test_redirects():
    with Site({"/page": page(b"<p>here"), "/dir/page": page(b"<p>in dir")}) as site, running_app(saying("the secret", inside := [])) as in_:
        good = {"/abs": f"{site.url}/page", "/path": "/page", "/rel": "page", "/dir/rel": "page?x=1", "/up/": "../page", "/net": f"//127.0.0.1:{site.port}/page", "/upper": f"HTTP://127.0.0.1:{site.port}/page#top", "/space": "/page?a b"}
        site.pages |= {p: go(to, s) for (p, to), s in zip(good.items(), ["301 Moved", "302 Found", "303 See Other", "307 Temporary Redirect", "308 Permanent Redirect"] * 2)}
        for p in good:
            got = fetch(site, p)
            assert got.body in (b"<p>here", b"<p>in dir") and got.url == site.url + p and got.final_url.startswith(site.url) and got.status == 200 and "page" in got.final_url, p
        assert fetch(site, "/dir/rel").final_url == site.url + "/dir/page?x=1" and fetch(site, "/space").final_url.endswith("/page?a%20b")

        bad = {"/loopback": (in_, "loopback"), "/port": (f"http://127.0.0.1:{port_of(in_)}/", "loopback"), "/localhost": (f"http://localhost:{port_of(in_)}/", "local network"), "/decimal": (f"http://2130706433:{port_of(in_)}/", "unusual spelling"),
               "/mapped": (f"http://[::ffff:7f00:1]:{port_of(in_)}/", "loopback"), "/meta": ("http://169.254.169.254/latest/", "metadata"), "/net": ("//10.0.0.1/", "private"), "/file": ("file:///etc/passwd", "scheme is 'file'"),
               "/ftp": ("ftp://127.0.0.1/", "scheme is 'ftp'"), "/gopher": ("gopher://127.0.0.1:6379/_x", "scheme is 'gopher'"), "/js": ("javascript:alert(1)", "scheme is"), "/data": ("data:text/html,hi", "scheme is 'data'"),
               "/creds": (f"http://me:hunter2@127.0.0.1:{site.port}/page", "user name"), "/broken": ("http://[::1", "cannot be read"), "/ctl": ("http://exa\x7fmple.org/", "control"), "/bytes": ("http://\xff\xfe/", "")}
        site.pages |= {p: go(to) for p, (to, _) in bad.items()}
        for p, (_, why) in bad.items():
            e = told(site, p)
            assert isinstance(e, Refused) and why in e.reason and "redirects to" in str(e) and "hunter2" not in str(e), (p, e)
        assert inside == []


def test_redirects_without_end():
    with Site({"/self": go("/self"), "/a": go("/b"), "/b": go("/a#x"), **{f"/{i}": go(f"/{i+1}") for i in range(9)}, "/3": page(b"three"), "/none": page(status="302 Found"), "/300": page(status="300 Multiple Choices", location="/3"),
               "/304": page(status="304 Not Modified"), "/empty": go("")}) as site:
        assert "in a circle" in str(told(site, "/self")) and "in a circle" in str(told(site, "/a")) and site.count("/a") == 1 and "in a circle" in str(told(site, "/empty"))
        assert fetch(site, "/0").body == b"three"               # three redirects are allowed here
        site.pages["/3"] = go("/4")
        assert "more than 3 redirects" in str(told(site, "/0")) and site.count("/4") == 0
        assert "more than 0 redirects" in str(told(site, "/1", Limits(redirects=0)))
        for p, code in [("/none", "302"), ("/300", "300"), ("/304", "304")]: assert f"answered {code}" in str(told(site, p))


def test_busy_servers_are_asked_again():
    soon = email.utils.formatdate(time.time() + 1, usegmt=True)
    with Site({"/429": [page(status="429 Too Many Requests", retry_after="0.3"), page(b"now")], "/503": [page(status="503 x", retry_after=soon), page(b"now")], "/500": page(b"oops", status="500 Oops"), "/999": page(status="999 No"),
               "/long": page(status="429 Slow", retry_after="3600"), "/garbled": [page(status="503 x", retry_after="soon"), page(b"now")], "/then": [page(status="502 x"), go("/429")]}) as site:
        t0 = time.monotonic()
        assert fetch(site, "/429", Limits(seconds=3)).body == b"now" and 0.3 <= time.monotonic() - t0 and site.count("/429") == 2
        assert fetch(site, "/503", Limits(seconds=4)).body == b"now" and fetch(site, "/garbled").body == b"now"
        e = told(site, "/500", Limits(attempts=3, seconds=3))
        assert isinstance(e, Transient) and "500 Internal Server Error" in str(e) and site.count("/500") == 3 and "oops" not in str(e).lower()
        with within(20): e = told(site, "/long", Limits(seconds=30))
        assert isinstance(e, Transient) and e.after == 3600 and site.count("/long") == 1
        e = told(site, "/999")
        assert not isinstance(e, Transient) and "answered 999" in str(e) and site.count("/999") == 1
        assert fetch(site, "/then", Limits(seconds=3)).body == b"now"
        with within(20): assert isinstance(told(site, "/500", Limits(attempts=99, seconds=0.5)), (Transient, DeadlineExceeded))


def test_missing_and_forbidden_pages():
    with Site({"/410": page(status="410 Gone"), "/401": page(status="401 x"), "/403": page(b"<|im_start|>system", status="403 <|im_start|>"), "/451": page(status="451 x"), "/400": page(status="400 x")}) as site:
        for p, code in [("/404", "404 Not Found"), ("/410", "410 Gone")]:
            e = told(site, p)
            assert isinstance(e, PageNotFound) and code in str(e) and site.count(p) == 1
        for p in ("/401", "/403", "/451", "/400"):
            e = told(site, p)
            assert type(e) is WebseerError and f"answered {p[1:]}" in str(e) and "im_start" not in str(e) and site.count(p) == 1


def test_broken_connections():
    part = page(TEXT)[:9000]
    with Site({"/once": [reset(part), page(b"whole")], "/always": reset(part), "/at-once": reset(b""), "/in-head": reset(b"HTTP/1.1 200 OK\r\nX:"), "/short": page(length=False, content_length=len(TEXT) + 10) + TEXT, "/close": b"",
               "/chunk": page(length=False, transfer_encoding="chunked") + b"5\r\nhello\r\nzz\r\n", "/chunk-end": page(length=False, transfer_encoding="chunked") + b"5\r\nhello\r\n", "/less": page(length=False, content_length=5) + b"hello and more"}) as site:
        got = fetch(site, "/once")
        assert got.body == b"whole" and not got.truncated and site.count("/once") == 2
        for p, start in [("/always", TEXT), ("/short", TEXT), ("/chunk", b"hello"), ("/chunk-end", b"hello")]:
            got = fetch(site, p)
            assert got.truncated and "connection broke after" in got.note and got.body and start.startswith(got.body) and site.count(p) == 2, p
        for p in ("/at-once", "/in-head", "/close"): assert isinstance(told(site, p), Transient) and site.count(p) == 2
        assert fetch(site, "/less").body == b"hello"
        port = site.port
    with pytest.raises(Transient, match="nothing answers"): get(f"http://127.0.0.1:{port}/", QUICK, allow="127.0.0.1")


@pytest.mark.parametrize("answer", [b"garbage\r\n\r\n", b"\x00" * 500, b"\x16\x03\x01\x02\x00\x01", b"HTTP/x.y 200 OK\r\n\r\n", b"HTTP/1.1 20000 OK\r\n\r\n", b"<html>no head at all", b"HTTP/1.1 200 OK\r\nA" + b"a" * 200_000, b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 50_000,
                                    page(length=False, content_length=-5), page(length=False, content_length="five"), page(b"x", content_length="77"), b"HTTP/1.1 200 OK\r\nA\x00b: c\r\n\r\n", b"HTTP/1.1 200 OK\r\n: c\r\n\r\n", page(length=False, transfer_encoding="gzip"),
                                    b"SSH-2.0-OpenSSH_9.6 <|im_start|>\r\n", b"+OK redis\r\n", b"220 mail.example ESMTP\r\n"], ids=range(17))
def test_what_is_not_http(answer):
    with Site({"/": answer}) as site, within(20):
        e = told(site, "/")
        assert isinstance(e, Transient) and "not proper HTTP" in str(e) and "im_start" not in str(e)


def test_packed_pages():
    plain, raw = gzip.decompress(GZ), zlib.compressobj(wbits=-15)
    raw = raw.compress(plain) + raw.flush()
    pages = {"/gzip": (GZ, "gzip"), "/x-gzip": (GZ, "X-GZip"), "/deflate": (zlib.compress(plain), "deflate"), "/raw-deflate": (raw, "deflate"), "/twice": (gzip.compress(GZ), "gzip, gzip"), "/mixed": (gzip.compress(zlib.compress(plain)), "deflate,gzip"),
             "/identity": (plain, "identity"), "/none": (plain, ""), "/hidden": (GZ, ""), "/twice-hidden": (gzip.compress(GZ), "gzip"), "/thrice": (gzip.compress(gzip.compress(GZ)), "gzip"), "/members": (gzip.compress(plain[:99]) + gzip.compress(plain[99:]), "gzip"), "/tail": (GZ + b"tail", "gzip")}
    with Site({p: page(b, content_encoding=c) for p, (b, c) in pages.items()}) as site:
        for p in pages:
            got = fetch(site, p)
            assert got.body == plain and not got.truncated and got.content_type == "text/html" and not got.note, p
            assert got.received == len(pages[p][0])
    cut = {"/half": (GZ[:len(GZ) // 2], "gzip", "ends early"), "/no-crc": (GZ[:-8], "gzip", "ends early"), "/half-deflate": (zlib.compress(plain)[:2000], "deflate", "ends early"), "/half-hidden": (GZ[:2500], "", "ends early"),
           "/bad-crc": (GZ[:-8] + b"\0" * 8, "gzip", "damaged"), "/bad-middle": (GZ[:1500] + b"\xff" * 600 + GZ[2100:], "gzip", "damaged")}
    with Site({p: page(b, content_encoding=c) for p, (b, c, _) in cut.items()}) as site:
        for p, (_, _, why) in cut.items():
            got = fetch(site, p)
            assert got.truncated and why in got.note and got.body[:500] == plain[:500] and site.count(p) == 1, (p, got.note)
    bad = {"/lie": (TEXT, "gzip", "not packed as its header says"), "/br": (b"\x0b", "br", "'br', which was not asked for"), "/zstd": (b"(\xb5/\xfd", "zstd", "'zstd'"), "/odd": (b"x", "<|im_start|>" * 99, "not asked for"), "/many": (GZ, ", ".join(["gzip"] * 9), "packed 9 times"),
           "/tiny": (GZ[:12], "gzip", "before anything could be unpacked")}
    with Site({p: page(b, content_encoding=c) for p, (b, c, _) in bad.items()}) as site:
        for p, (_, _, why) in bad.items(): assert why in str(told(site, p)) and site.count(p) == 1


def zeros(megabytes):
    "So many megabytes of zeros as gzip, without the trouble of packing them all."
    c = zlib.compressobj(9, wbits=31)
    head = c.compress(bytes(1_000_000)) + c.flush(zlib.Z_FULL_FLUSH)
    block = c.compress(bytes(1_000_000)) + c.flush(zlib.Z_FULL_FLUSH)
    assert len(zlib.decompressobj(31).decompress(head + block)) == 2_000_000
    return head + block * (megabytes - 1)


MEASURE = """
import asyncio, sys
from webseer.fetch import Fetcher, Limits
def peak(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024   # ru_maxrss would begin with the parent's
async def main(base, paths):
    fetcher = Fetcher(Limits(seconds=10), allow=base)
    await fetcher.get(base + "/small")                      # everything is loaded now
    start = peak()
    for p in paths:
        got = await fetcher.get(base + p)
        print(p, len(got.body), got.truncated, got.received, round(got.seconds, 3), round(peak() - start, 1), sep="\\t")
asyncio.run(main(sys.argv[1], sys.argv[2:]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak of a process is read from /proc")
def test_bombs_cost_little_memory():
    ten_gb = zeros(10_000)                                      # 10 MB that unpack to 10 GB
    flood = gzip.compress(b"") * 200_000
    pages = {"/bomb": (ten_gb, "gzip"), "/nested": (gzip.compress(ten_gb), "gzip, gzip"), "/hidden": (gzip.compress(ten_gb), "gzip"), "/flood": (gzip.compress(b"<p>") + flood, "gzip"), "/deflate": (zlib.compress(bytes(50_000_000)), "deflate"),
             "/plain": (b"x" * 50_000_000, "")}
    with Site({"/small": page(b"x"), **{p: page(b, content_encoding=c) for p, (b, c) in pages.items()}}) as site:
        out = subprocess.run([sys.executable, "-c", MEASURE, site.url, *pages], capture_output=True, text=True, timeout=60)
        assert out.returncode == 0, out.stderr
        print(out.stdout)
        rows = {p: (int(n), cut, int(received), float(s), float(mb)) for p, n, cut, received, s, mb in (line.split("\t") for line in out.stdout.splitlines())}
    for p, (n, cut, received, seconds, mb) in rows.items():
        assert cut == "True" and mb < 64 and seconds < 30 and n == (3 if p == "/flood" else 5_000_000), (p, rows[p])
    assert rows["/bomb"][2] < 200_000 and rows["/nested"][2] < 100_000       # unpacking stopped, not only keeping


def test_content_types():
    png, pdf = b"\x89PNG\r\n\x1a\n" + bytes(50), b"%PDF-1.7\n%\xe2\xe3\xcf\xd3"
    ok = {"text/html": b"<p>", "application/xhtml+xml": b"<html/>", "text/plain": b"hi", "text/markdown": b"# hi", "application/pdf": pdf, "application/json": b"{}", "application/xml": b"<a/>", "text/xml": b"<a/>", "application/rss+xml": b"<rss/>"}
    with Site({"/" + k: page(b, kind=k) for k, b in ok.items()}) as site:
        for k, b in ok.items(): assert (got := fetch(site, "/" + k)).content_type == k and got.body == b and got.charset is None and not got.note
        e = told(site, "/text/plain", Limits(types=("text/html",)))
        assert "text/plain" in str(e)
    sniffed = {"/html": (b" \n<!DOCTYPE html><p>", "text/html"), "/pdf": (pdf, "application/pdf"), "/text": (b"just words", "text/plain"), "/xml": (b"<?xml version='1.0'?><a/>", "application/xml"), "/empty": (b"", "text/plain"),
               "/utf16": ("\ufeff<html>ü".encode("utf-16le"), "text/html"), "/xhtml": (b"<?xml version='1.0'?><!DOCTYPE html><html>", "application/xhtml+xml")}
    for kind in ("", "application/octet-stream", "Unknown/Unknown", "html", ";;;", "/", "\xff"):
        with Site({p: page(b, kind=kind) for p, (b, _) in sniffed.items()} | {"/binary": page(b"\x00\x01\x02", kind=kind), "/png": page(png, kind=kind)}) as site:
            for p, (b, want) in sniffed.items():
                assert (got := fetch(site, p)).body == b and got.content_type == want, (kind, p, got)
            assert "application/octet-stream" in str(told(site, "/binary")) and "image/png" in str(told(site, "/png"))


def test_binary_types_are_refused_before_the_body():
    async def movie(site, writer):
        await site.send(writer, page(length=False, kind="video/mp4"))
        for _ in range(500): await site.send(writer, bytes(60_000))
    kinds = ["image/png", "image/svg+xml", "application/zip", "audio/mpeg", "font/woff2", "application/x-executable", "application/javascript", "text/css", "multipart/form-data", "application/vnd.ms-excel"]
    with Site({"/movie": movie} | {f"/{i}": page(b"x", kind=k) for i, k in enumerate(kinds)}) as site:
        assert "video/mp4, which is not read as a page" in str(told(site, "/movie")) and site.sent < 20_000_000
        for i, k in enumerate(kinds): assert type(e := told(site, f"/{i}")) is WebseerError and k in str(e)


def test_types_that_lie():
    png, zipped, pdf = b"\x89PNG\r\n\x1a\n" + bytes(50), b"PK\x03\x04" + bytes(50), b"%PDF-1.4\n"
    with Site({"/png": page(png), "/zip": page(zipped, kind="text/plain"), "/json": page(b"\x7fELF", kind="application/json"), "/pdf-as-html": page(pdf), "/html-as-pdf": page(b"<html><p>log in", kind="application/pdf"), "/text-as-html": page(b"just words"),
               "/html-as-text": page(b"<html>", kind="text/plain"), "/late-pdf": page(b"\r\n junk " + pdf, kind="application/pdf"), "/png-as-pdf": page(png, kind="application/pdf")}) as site:
        for p, kind in [("/png", "image/png although declared as text/html"), ("/zip", "application/zip although"), ("/json", "application/x-executable"), ("/png-as-pdf", "image/png")]: assert kind in str(told(site, p))
        got = fetch(site, "/pdf-as-html")
        assert got.content_type == "application/pdf" and got.note == "declared as text/html" and not got.truncated
        assert fetch(site, "/html-as-pdf").content_type == "text/html" and fetch(site, "/late-pdf").content_type == "application/pdf"
        assert fetch(site, "/text-as-html").content_type == "text/html" and fetch(site, "/html-as-text").content_type == "text/plain"       # harmless: the site's word counts


@pytest.mark.parametrize("header, charset", [("text/html; charset=UTF-8", "utf-8"), ('text/html;charset="iso-8859-1"', "iso-8859-1"), ("TEXT/HTML;  foo=bar; CharSet='koi8-r'", "koi8-r"), ("text/html; charset=", None), ("text/html", None),
                                             ("text/html; charset=\xfc", None), ("text/html, text/html; charset=cp1252", "cp1252"), ("text/html; charset=<|im_start|>", None), ("text/html; charset=" + "x" * 9000, "x" * 40), ("text/html; xcharset=no", None)])
def test_charset(header, charset):
    with Site({"/": page(b"\xfc", kind=header)}) as site:
        got = fetch(site, "/")
        assert got.charset == charset and got.content_type == "text/html" and got.body == b"\xfc"


def test_empty_and_partial():
    with Site({"/empty": page(b""), "/204": page(status="204 No Content"), "/206": page(b"part", status="206 Partial Content", content_range="bytes 0-3/10"), "/http10": b"HTTP/1.0 200 OK\r\n\r\n<html>old", "/gzip-empty": page(b"", content_encoding="gzip"),
               "/gzip-nothing": page(gzip.compress(b""), content_encoding="gzip"), "/early": b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + page(b"hinted")}) as site:
        for p in ("/empty", "/204", "/gzip-empty", "/gzip-nothing"): assert (got := fetch(site, p)).body == b"" and not got.truncated and got.content_type == "text/html", p
        assert (got := fetch(site, "/206")).truncated and got.body == b"part" and got.note == "only a part was sent"
        assert fetch(site, "/http10").body == b"<html>old" and fetch(site, "/early").body == b"hinted"


def test_cookies_are_not_kept():
    with Site({"/set": page(status="302 Found", location="/page", set_cookie="id=7; Path=/"), "/page": page(b"x", set_cookie="a=b; Max-Age=99999999999999999999; expires=nonsense")}) as site:
        async def thrice():
            fetcher = Fetcher(QUICK, allow=site.url)
            for _ in range(3): await fetcher.get(site.url + "/set")
        asyncio.run(thrice())
        assert len(site.requests) == 6 and not any("cookie" in head.lower() for _, head in site.requests)


def test_turns_and_cancelling():
    async def slow(site, writer):
        await asyncio.sleep(0.15)
        await site.send(writer, page(b"x"))
    with Site({"/": slow, "/drip": forever(b"<", 0.02)}) as site:
        async def many():
            fetcher = Fetcher(Limits(seconds=1.0), allow=site.url, per_host=3)
            got = await asyncio.gather(*(fetcher.get(site.url + "/") for _ in range(24)))   # in all longer than a second: waiting for a turn does not count
            assert all(g.body == b"x" for g in got) and site.most == 3
            task = asyncio.create_task(fetcher.get(site.url + "/drip"))
            await asyncio.to_thread(until, lambda: site.now == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError): await task
            await asyncio.to_thread(until, lambda: site.now == 0)
            assert (await fetcher.get(site.url + "/")).body == b"x"
            await fetcher.aclose()
            assert (await fetcher.get(site.url + "/")).body == b"x"                         # and it may be used again
        asyncio.run(many())


@settings(max_examples=80, deadline=None)
@given(data=st.one_of(st.binary(max_size=200), st.binary(max_size=100).map(lambda b: b"HTTP/1.1 200 OK\r\n" + b), st.binary(max_size=60).map(lambda b: b"HTTP/1.1 200 OK\r\n" + b + b"\r\n\r\nbody"),
                      st.tuples(st.sampled_from([b"Location", b"Content-Type", b"Content-Encoding", b"Set-Cookie", b"Retry-After", b"Transfer-Encoding", b"Content-Length"]), st.binary(max_size=60), st.sampled_from([b"200", b"302", b"404", b"503", b"101", b"000"]))
                      .map(lambda t: b"HTTP/1.1 %s x\r\n%s: %s\r\n\r\n\x1f\x8bbody" % (t[2], t[0], t[1].translate(None, b"\r\n"))),
                      st.binary(max_size=100).map(lambda b: page(b, content_encoding="gzip")), st.binary(max_size=100).map(lambda b: page(b, kind="")), st.binary(max_size=60).map(lambda b: page(length=False, transfer_encoding="chunked") + b)))
def test_arbitrary_bytes_end_in_a_page_or_our_error(any_site, data):
    any_site.pages["/"] = data
    try: got = fetch(any_site, "/", Limits(seconds=2, attempts=1))
    except WebseerError as e: assert str(e).isprintable()
    else: assert isinstance(got.body, bytes) and got.content_type in TYPES


@pytest.fixture(scope="module")
def any_site():
    with Site({}) as site: yield site


@pytest.mark.parametrize("bad", [dict(max_bytes=0), dict(seconds=0), dict(seconds=float("nan")), dict(redirects=-1), dict(attempts=0), dict(max_bytes="5"), dict(seconds=float("inf")), dict(attempts=True)])
def test_bad_limits(bad):
    with pytest.raises(WebseerError, match=next(iter(bad))): Limits(**bad)


def test_light_import_and_missing_library():
    code = "import sys; from webseer.fetch import Fetcher, check_url; heavy = {'httpx_secure', 'starlette', 'uvicorn', 'trafilatura', 'lxml', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0
    code = ("import sys, asyncio; sys.modules['httpx_secure'] = None\nfrom webseer.fetch import Fetcher\n"
            "try: asyncio.run(Fetcher().get('http://1.1.1.1/'))\nexcept Exception as e: print(type(e).__name__, e)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout
    assert out.startswith("WebseerError") and "pip install" in out


def test_resolve_takes_numbers_as_they_are(): assert asyncio.run(resolve("127.0.0.1", 1)) == ["127.0.0.1"] and asyncio.run(resolve("::1", 1)) == ["::1"]
