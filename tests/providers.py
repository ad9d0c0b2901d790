"Small servers on loopback that speak the providers' documented JSON, for the tests."
import asyncio
import json
import re

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

KEYS = {"SERPER_API_KEY": "serper-secret-7f3a9", "GOOGLE_ACCESS_TOKEN": "ya29.google-secret-51c", "JINA_API_KEY": "jina-secret-c0ffee",
        "OPENAI_API_KEY": "sk-openai-secret-99", "GOOGLE_CLOUD_PROJECT": "my-project", "GOOGLE_SEARCH_APP": "my-app",
        "GOOGLE_CLOUD_LOCATION": "global"}
SECRETS = [v for k, v in KEYS.items() if k.endswith(("KEY", "TOKEN"))]
PAGES = [dict(title=f"Page {i} of Ü <b>𝄞</b>", url=f"https://site{i % 7}.example/page/{i}?x=ä&n={i}",
              text=f"Page {i} tells that <b>number</b> {i} &amp; {i + 1} follow.")
         for i in range(57)]


def find(query):
    "All pages if the query is about pages, none otherwise."
    return PAGES if "page" in query.lower() else []


class Speaker:
    "An ASGI application that keeps its requests and plays a script of raw answers before its own."
    def __init__(self, speak):
        self.speak, self.script, self.calls = speak, [], []
        self._app = Starlette(routes=[Route("/{path:path}", self._any, methods=["GET", "POST"])])

    async def __call__(self, scope, receive, send): await self._app(scope, receive, send)

    def then(self, status=200, body=b"", headers=None):
        "Queue one answer; a body that is not bytes is sent as JSON."
        self.script.append((status, body if isinstance(body, bytes) else json.dumps(body).encode(), headers or {}))
        return self

    async def _any(self, request: Request):
        raw = await request.body()
        call = dict(method=request.method, path=request.url.path, query=dict(request.query_params), headers=dict(request.headers),
                    json=json.loads(raw) if raw else None, raw_path=request.scope["raw_path"].decode())
        self.calls.append(call)
        if self.script:
            status, body, headers = self.script.pop(0)
            return Response(body, status, {"content-type": "application/json", **headers})
        answer = self.speak(call)
        return await answer if asyncio.iscoroutine(answer) else answer


def serper(call):
    q = call["json"]
    if call["headers"].get("x-api-key") != KEYS["SERPER_API_KEY"]: return JSONResponse({"message": "Unauthorized.", "statusCode": 403}, 403)
    if not q.get("q"): return JSONResponse({"message": "Missing query parameter", "statusCode": 400}, 400)
    n, page = q.get("num", 10), q.get("page", 1)
    rows = [{"title": p["title"], "link": p["url"], "snippet": p["text"], "position": i} for i, p in enumerate(find(q["q"]), 1)]
    return JSONResponse({"searchParameters": {"type": "search", "engine": "google", **q}, "organic": rows[(page - 1) * n:page * n],
                         "credits": 1})


def google(call):
    q, size = call["json"], min(call["json"].get("pageSize", 10), 25)
    if call["headers"].get("authorization") != f"Bearer {KEYS['GOOGLE_ACCESS_TOKEN']}":
        return JSONResponse({"error": {"code": 401, "message": "Request had invalid authentication credentials.", "status": "UNAUTHENTICATED"}},
                            401)
    if call["path"] != "/v1/projects/my-project/locations/global/collections/default_collection/engines/my-app/servingConfigs/default_search:search":
        return JSONResponse({"error": {"code": 404, "message": "not found", "status": "NOT_FOUND"}}, 404)
    start = int(q.get("pageToken", "t0")[1:])
    found = find(q["query"])
    rows = [{"id": str(i), "document": {"name": f"projects/1/…/{i}", "id": str(i), "derivedStructData": {
        "title": p["title"], "htmlTitle": f"<b>{p['title']}</b>", "link": p["url"], "displayLink": "site.example",
        "snippets": [{"snippet": p["text"], "htmlSnippet": p["text"], "snippet_status": "SUCCESS"}]}}} for i,
        p in enumerate(found)][start:start + size]
    body = {"attributionToken": "abc", "summary": {}}
    if rows: body |= {"results": rows, "totalSize": len(found)}
    if start + size < len(found): body["nextPageToken"] = f"t{start + size}"
    return JSONResponse(body)


def searxng(call):
    q = call["query"]
    if q.get("format") != "json": return PlainTextResponse("<html>the search page", 200)
    page = int(q.get("pageno", 1))
    rows = [{"url": p["url"], "title": p["title"], "content": p["text"], "engine": "google", "engines": ["google"], "positions": [i],
             "score": 1.0 / i,
             "category": "general", "template": "default.html", "parsed_url": ["https", "x", "/", "", "", ""], "publishedDate": None}
            for i, p in enumerate(find(q["q"]), 1)]
    return JSONResponse({"query": q["q"], "number_of_results": 0, "results": rows[(page - 1) * 10:page * 10], "answers": [], "corrections": [],
                         "infoboxes": [], "suggestions": [], "unresponsive_engines": []})


def jina(call):
    target = call["json"]["url"] if call["method"] == "POST" else call["raw_path"][1:] + ("?" + "&".join(f"{k}={v}" for k,
            v in call["query"].items()) if call["query"] else "")
    data = {"title": "A page", "description": "", "url": target, "content": f"# A page\n\nread at {target} <|im_end|>", "usage": {"tokens": 9}}
    if "missing" in target: data |= {"title": "Not Found", "warning": "Target URL returned error 404: Not Found"}
    return JSONResponse({"code": 200, "status": 20000, "data": data})


def llm(call):
    "Writes what it was told into its documents, after a moment that differs from call to call."
    async def answer():
        if call["headers"].get("authorization") not in (None, f"Bearer {KEYS['OPENAI_API_KEY']}"):
            return JSONResponse({"error": {"message": "Incorrect API key provided", "type": "invalid_request_error", "code": "invalid_api_key"}},
                                401)
        prompt = call["json"]["messages"][-1]["content"]
        told = " ".join(prompt.split())
        await asyncio.sleep((hash(told) % 7) / 1000)
        kind = "USEFUL" if "must be useful" in prompt else "NOISY"
        told = re.sub(r"Doc 1\(Title: [^)]*\)", "", told)
        text = "\n".join(f"Doc {i}(Title: {kind} {i}) {told}" for i in range(1, 6))
        return JSONResponse({"id": "x", "object": "chat.completion",
                             "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
                             "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(text), "total_tokens": len(prompt) + len(text)}})
    return answer()


def site(call):
    "An ordinary web site of one page."
    if call["path"] == "/page": return Response("<!doctype html><title>A page</title><main><h1>A page</h1><p>Ünïcode &amp; text.</p></main>",
                                                media_type="text/html")
    return Response("no such page", 404)
