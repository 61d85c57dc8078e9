"""The page at `/`: what it is made of, what it asks, and, where a browser is installed, what people see."""

import html.parser
import importlib.util
import json
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.support.server.http_server import TINY, RunningServer
from tests.support.server.scripted import saying

ROOT = Path(__file__).resolve().parents[3]
STATIC = ROOT / "hetero_attn" / "server" / "page" / "static"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    BROWSER is None or importlib.util.find_spec("playwright") is None,
    reason="no browser: install Chromium and the extra browser (playwright)",
)


@pytest.fixture(scope="module")
def elastic():
    """A server of an elastic model on the emulated GPU."""
    from hetero_attn.llm import LLM

    def load() -> LLM:
        return LLM(
            TINY, device="emulated", gpu_memory="8MiB", elastic=True, num_threads=1, max_context=256, max_batch=2, progress=False
        )  # fmt: skip

    with RunningServer(load) as running:
        yield running


class Parts(html.parser.HTMLParser):
    """Addresses and inline code of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses, self.inline, self.labels, self.fields = [], [], set(), set()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.addresses += [given[name] for name in ("src", "href") if name in given]
        self.inline += [name for name in given if name.startswith("on") or name == "style"]
        if tag == "label":
            self.labels.add(given["for"])
        if tag in ("input", "textarea", "select"):
            self.fields.add(given["id"])


def test_its_files_are_served_with_a_policy_and_are_small(http):
    parts = Parts()
    parts.feed(http.get("/").text)
    own = [address for address in parts.addresses if not address.startswith("data:")]
    answers = [http.get(address) for address in ("/", *own)]

    assert {answer.status_code for answer in answers} == {200}
    assert all("default-src 'none'" in answer.headers["content-security-policy"] for answer in answers)
    assert all("unsafe" not in answer.headers["content-security-policy"] for answer in answers)
    assert sum(len(answer.content) for answer in answers) < 60_000
    assert all(address.startswith("/ui/") for address in own), "nothing comes from elsewhere"
    assert parts.inline == [] and parts.fields <= parts.labels, "no inline code, and every field has a label"


def test_no_text_becomes_markup():
    code = "".join(path.read_text() for path in STATIC.glob("*.js"))

    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", code)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", code)


@pytest.mark.parametrize(
    "path",
    ["/ui/none.js", "/ui/__init__.py", "/ui/..%2ffiles.py", "/ui/index.htm", "/ui/%00.js", f"/ui/{'a' * 300}.js"],
)
def test_nothing_else_is_served(http, path):
    assert http.get(path).status_code == 404


def test_the_page_can_be_left_out():
    with RunningServer(has_page=False) as server:
        assert httpx.get(server.url + "/", trust_env=False).status_code == 404


def test_the_page_needs_no_key_and_what_it_asks_does():
    with RunningServer(api_key="k") as server:
        statuses = {
            path: httpx.get(server.url + path, trust_env=False).status_code
            for path in ("/", "/ui/app.js", "/hetero/report")
        }

    assert statuses == {"/": 200, "/ui/app.js": 200, "/hetero/report": 401}


def test_the_report_says_what_the_model_knows(http, server):
    http.post("/v1/completions", json={"prompt": "A list", "max_tokens": 4})
    report = http.get("/hetero/report").json()

    assert report["model"] == "tiny" and report["state"] == "ready" and report["max_context"] == 512
    assert report["memory"] == server.llm.plan.memory.to_dict()
    assert report["phases"]["decode"]["steps"] > 0 and report["running"] == 0
    assert http.get("/hetero/plan").status_code == 400, "no GPU"


def test_the_curve_is_the_planners_and_resize_applies_it(elastic):
    from placement.adapt.elastic import plan_for_budget

    with httpx.Client(base_url=elastic.url, timeout=60, trust_env=False) as http:
        curve = http.get("/hetero/plan").json()["curve"]
        sizes = [point["gpu_memory_bytes"] for point in curve]
        known = [point for point in curve if point["decode_tokens_per_s"] is not None]
        planned = elastic.llm.planned
        own = plan_for_budget(planned.plan, planned.hardware, planned.policy, known[0]["gpu_memory_bytes"])
        wanted = known[0]["gpu_memory_bytes"]
        text = {"prompt": "A list is", "max_tokens": 8, "temperature": 0}
        before = http.post("/v1/completions", json=text).json()["choices"][0]["text"]
        done = http.post("/hetero/resize", json={"gpu_memory_bytes": wanted})
        after = http.post("/v1/completions", json=text).json()["choices"][0]["text"]
        refused = [http.post("/hetero/resize", json={"gpu_memory_bytes": size}) for size in (1, -5, "many")]

    assert sizes == sorted(sizes) and 8 << 20 in sizes and len(known) > 1
    assert known[0]["decode_tokens_per_s"] == own.predicted.decode.tokens_per_s
    assert done.json() == {"gpu_memory_bytes": wanted} and elastic.llm.plan.gpu_memory_bytes == wanted
    assert after == before
    assert [answer.status_code for answer in refused] == [400, 400, 400]


def test_the_curve_is_planned_once_for_all_who_ask_and_anew_behind_a_resize(elastic, monkeypatch):
    from hetero_attn.server.page import report

    planned: list[int] = []
    point = report._point
    monkeypatch.setattr(report, "_point", lambda own, size: planned.append(size) or point(own, size))
    with httpx.Client(base_url=elastic.url, timeout=60, trust_env=False) as http:
        own = elastic.llm.plan.gpu_memory_bytes
        http.post("/hetero/resize", json={"gpu_memory_bytes": own})
        with ThreadPoolExecutor(4) as pool:
            curves = list(pool.map(lambda _: http.get("/hetero/plan").json()["curve"], range(8)))
        once = len(planned)
        known = [point["gpu_memory_bytes"] for point in curves[0] if point["decode_tokens_per_s"] is not None]
        other = next(size for size in known if size != own)
        assert http.post("/hetero/resize", json={"gpu_memory_bytes": other}).is_success
        http.get("/hetero/plan")
        http.post("/hetero/resize", json={"gpu_memory_bytes": own})

    assert all(curve == curves[0] for curve in curves) and once == len(curves[0])
    assert len(planned) >= 2 * once - 1


def test_an_inelastic_model_is_not_resized(http):
    answer = http.post("/hetero/resize", json={"gpu_memory_bytes": 1 << 20})

    assert answer.status_code == 400 and "elastic" in answer.json()["error"]["message"]


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_events_are_read_at_every_cut():
    frames = ': ping 3/9\n\ndata: {"a":"é\U0001f389"}\n\n: other\n\ndata: [DONE]\n\n'
    check = (
        "const text = " + json.dumps(frames) + ";\n"
        "for (let cut = 0; cut <= text.length; cut++) {\n"
        "  const reader = new EventReader();\n"
        "  const found = [...reader.feed(text.slice(0, cut)), ...reader.feed(text.slice(cut))];\n"
        '  if (JSON.stringify(found) !== JSON.stringify([{ping: [3, 9]}, {a: "é\U0001f389"}])) throw new Error(cut);\n'
        "}\n"
        "const spent = between({d: {steps: 1, wall_s: 1}}, {d: {steps: 3, wall_s: 2}, p: {steps: 0, wall_s: 0}});\n"
        "if (spent.d.steps !== 2 || spent.p !== null || bytes(3 << 20) !== '3.00 MiB' || rate(NaN) !== '-') throw new Error(spent);\n"
    )
    done = subprocess.run(
        ["node", "-e", (STATIC / "stream.js").read_text() + check], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture
def visit(browser):
    """Opens a server's page; fails where anything is asked elsewhere, or an error is logged. Screenshots are kept."""
    opened, wrong = [], []

    def open_page(server, **options):
        tab = browser.new_page(**options)
        tab.on(
            "request",
            lambda request: wrong.append(request.url) if not request.url.startswith((server.url, "data:")) else None,
        )
        tab.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.goto(server.url)
        opened.append(tab)
        return tab

    yield open_page
    for tab in opened:
        tab.close()
    assert wrong == []


def wait_for(tab, expression: str, wait_s: float = 60) -> None:
    """Wait until an expression holds; the page's policy forbids a waiting script inside of it."""
    end = time.monotonic() + wait_s
    while not tab.evaluate(expression):
        assert time.monotonic() < end, expression
        tab.wait_for_timeout(20)


def keep_picture(tab, name: str) -> None:
    folder = ROOT / "build" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=folder / f"{name}.png", full_page=True)


@needs_browser
def test_a_conversation_by_keyboard_and_no_markup_from_a_model(visit, server):
    evil = '<img src=x onerror="document.title=1"><script>document.title=1</script> & a <b>list</b>'
    with saying(server.llm, evil):
        tab = visit(server)
        tab.keyboard.press("Tab")
        tab.focus("#words")
        tab.keyboard.type("Hi <i>there</i>")
        tab.keyboard.press("Enter")
        wait_for(
            tab, "!document.getElementById('send').disabled && document.querySelectorAll('#messages li').length === 2"
        )
    wait_for(tab, "document.title === 'tiny'")

    assert tab.locator("#messages li.user").inner_text() == "Hi <i>there</i>"
    assert tab.locator("#messages li.assistant").inner_text() == evil
    assert tab.locator("#messages img, #messages script, #messages b").count() == 0
    assert "tokens/s" in tab.locator("#speed").inner_text()
    keep_picture(tab, "chat")


@needs_browser
def test_stop_ends_the_request(visit):
    with RunningServer(step_s=0.05) as slow:
        tab = visit(slow)
        tab.fill("#words", "What is a list?")
        tab.click("#send")
        wait_for(tab, "document.querySelector('#messages .assistant')?.textContent.length > 0")
        tab.click("#stop")
        slow.wait_until(lambda: not slow.service.driver.live, 30)
        wait_for(tab, "document.getElementById('stop').disabled")
        tab.goto("about:blank")  # it asks for the report every second, also of a server that has ended


@needs_browser
def test_clear_during_an_answer_begins_anew(visit):
    with RunningServer(step_s=0.05) as slow, saying(slow.llm, "word " * 100) as prompts:
        tab = visit(slow)
        tab.fill("#words", "First?")
        tab.click("#send")
        wait_for(tab, "document.querySelector('#messages .assistant')?.textContent.length > 0")
        tab.click("#clear")
        wait_for(tab, "!document.getElementById('send').disabled")
        tab.fill("#words", "Second?")
        tab.click("#send")
        slow.wait_until(lambda: len(prompts) == 2, 30)
        shown = tab.locator("#messages li.user").all_inner_texts()
        tab.goto("about:blank")

    assert "Second?" in prompts[1] and "First?" not in prompts[1] and "word" not in prompts[1]
    assert shown == ["Second?"]


@needs_browser
def test_the_slider_shows_the_curve_and_applies_it(visit, elastic):
    tab = visit(elastic)
    wait_for(tab, "document.querySelectorAll('#curve polyline').length === 1")
    curve = httpx.get(elastic.url + "/hetero/plan", trust_env=False, timeout=60).json()["curve"]
    tab.focus("#gpu")
    tab.keyboard.press("End")
    shown = tab.locator("#wish").inner_text()
    tab.click("#apply")
    wait_for(tab, "document.getElementById('told').textContent.startsWith('now ')")

    assert f": {round(curve[-1]['decode_tokens_per_s'])} tokens/s" in shown
    assert elastic.llm.plan.gpu_memory_bytes == curve[-1]["gpu_memory_bytes"]
    keep_picture(tab, "budget")


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_narrow_screen_in_both_colours(visit, elastic, scheme):
    tab = visit(elastic, viewport={"width": 400, "height": 800}, color_scheme=scheme)
    wait_for(tab, "document.querySelectorAll('#memory .track').length > 0")
    width = tab.evaluate("document.documentElement.scrollWidth")
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")

    assert width <= 400
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 382) == (scheme == "dark")
    keep_picture(tab, f"narrow_{scheme}")
