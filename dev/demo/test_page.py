#!/usr/bin/env python3
"""Tests serve_gpt2's page in a browser, against a server with any model of Arabic poems.

    apt-get install chromium chromium-driver && pip install selenium
    dev/demo/test_page.py --server http://127.0.0.1:8080
    dev/demo/test_page.py --command './serve_gpt2 out/model.bin --port 8099'
        [--screenshots DIR] [--only WORD]

--command starts the server itself, waits for the line with its address, and in one test stops it while it
writes. Where it names one model, that model is served under a second name, too, so that two can be compared.
The last line is "N passed, N failed". The exit code is 1 if a test failed.
"""
import argparse
import base64
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.request

from selenium.common.exceptions import ElementNotInteractableException, StaleElementReferenceException
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

FOLDER = os.path.dirname(os.path.abspath(__file__))
BEGINNING = "يا ليل طلت * أم أنت"  # both hemistichs, so that any model's first verse has two columns
SECONDS = 30  # for a poem to be written
LIMIT = 60 * 1024  # bytes of the page's three files
TESTS = []

# Runs before the page's script: keeps what the page sends, and how often its poems grow.
RECORDER = """
window.sent = [];
const original = window.fetch;
window.fetch = (url, options) => {
  if (options?.body) window.sent.push([url, JSON.parse(options.body)]);
  return original(url, options);
};
window.growths = 0;
addEventListener('DOMContentLoaded', () => new MutationObserver(changes => {
  if (changes.some(c => c.target.closest?.('.poem') && c.addedNodes.length)) window.growths++;
}).observe(document.body, {childList: true, subtree: true}));
"""
# WCAG 2's contrast of each visible text of the page with the page's background, or its own.
CONTRAST = """
const luminance = color => color.match(/[\\d.]+/g).slice(0, 3).map(Number).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const background = e => !e ? 'rgb(255,255,255)' : getComputedStyle(e).backgroundColor.endsWith(', 0)')
    ? background(e.parentElement) : getComputedStyle(e).backgroundColor;
const worst = {};
for (const e of document.querySelectorAll('body *')) {
  const text = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
  if (!e.offsetWidth || e.closest(':disabled, option')) continue;
  if (!text && !e.matches('input, textarea, select')) continue;
  const [a, b] = [luminance(getComputedStyle(e).color), luminance(background(e))].sort((x, y) => y - x);
  const name = e.tagName + '.' + e.className, ratio = (a + 0.05) / (b + 0.05);
  if (ratio < 4.5) worst[name] = ratio;
}
return worst;
"""

# How many pixels of a PNG's left and right halves have another colour than its corner.
INK = """
const [encoded, done] = arguments, bytes = Uint8Array.from(atob(encoded), c => c.charCodeAt(0));
createImageBitmap(new Blob([bytes])).then(bitmap => {
  const {width, height} = bitmap, ctx = new OffscreenCanvas(width, height).getContext('2d');
  ctx.drawImage(bitmap, 0, 0);
  const pixels = new Uint32Array(ctx.getImageData(0, 0, width, height).data.buffer), halves = [0, 0];
  for (let i = 0; i < pixels.length; i++)
    if (pixels[i] !== pixels[0]) halves[i % width < width / 2 ? 0 : 1]++;
  done(halves);
});
"""


def test(promise):
    def register(run):
        TESTS.append((promise, run))
        return run
    return register


class Skipped(Exception):
    """Why the server cannot be tested for a promise."""


def check(condition, *found):
    if not condition:
        raise AssertionError(" ".join(str(f) for f in found) or "not so")


def wait_for(what, condition, seconds=SECONDS):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.03)
    raise AssertionError(f"{what}: not within {seconds} s")


class Server:
    """A server that a command's words start. url: where it is."""

    def __init__(self, words):
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, text=True, start_new_session=True)
        self.url, self.output = None, []
        reader = threading.Thread(target=self.read, daemon=True)
        reader.start()
        try:
            wait_for("the server's address", lambda: self.url or not reader.is_alive())
            check(self.url, "the server ended without an address")
        except AssertionError as error:
            self.stop()
            raise AssertionError(f"{error}; it wrote:\n{''.join(self.output)}") from None

    def read(self):
        for line in self.process.stdout:
            self.output.append(line)
            if found := re.search(r"http://[\w.:\[\]-]+", line):
                self.url = self.url or found.group().rstrip(".")

    def stop(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def with_two_models(command, folder):
    """The words of a server's command. Where they have one model, a link in `folder` to it is the second."""
    words = shlex.split(command)
    models = [i for i, word in enumerate(words) if word.endswith(".bin") and words[i - 1] != "--tokenizer"]
    if len(models) == 1:
        model = os.path.abspath(words[models[0]])
        second = os.path.join(folder, "second")
        os.symlink(os.path.dirname(model), second)
        words.insert(models[0] + 1, os.path.join(second, os.path.basename(model)))
    return words


class Page:
    """The page in a browser."""

    def __init__(self, url, downloads):
        options = webdriver.ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "lang=en"):
            options.add_argument("--" + flag)
        service = webdriver.ChromeService("/usr/bin/chromedriver")
        self.driver = webdriver.Chrome(options=options, service=service)
        self.url, self.downloads = url, downloads
        self.cdp("Page.addScriptToEvaluateOnNewDocument", source=RECORDER)
        self.cdp("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
        self.cdp("Browser.setDownloadBehavior", behavior="allow", downloadPath=downloads)
        with urllib.request.urlopen(url + "/v1/models") as answer:
            self.models = json.load(answer)["data"]

    def cdp(self, command, **parameters):
        return self.driver.execute_cdp_cmd(command, parameters)

    def js(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def size(self, width, height):
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                 mobile=width < 500)

    def prefer(self, **features):
        pairs = [{"name": "prefers-" + k.replace("_", "-"), "value": v} for k, v in features.items()]
        self.cdp("Emulation.setEmulatedMedia", features=pairs)

    def offline(self, lost):
        self.cdp("Network.enable")
        self.cdp("Network.emulateNetworkConditions", offline=lost, latency=0, downloadThroughput=-1,
                 uploadThroughput=-1)

    def open(self, keep_poems=False):
        """Loads the page anew, as a first visit or with the poems of the last one."""
        self.driver.get(self.url)
        if not keep_poems:
            self.js("localStorage.clear()")
            self.driver.get(self.url)
        wait_for("the models", lambda: self.js("return models.length"))

    def keys(self, *keys):
        """Types where the focus is."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def focus(self):
        return self.js("return (e => e.id || e.className || e.tagName)(document.activeElement)")

    def fill(self, **values):
        for name, value in values.items():
            self.js("const e = document.getElementById(arguments[0]); if (e.closest('details'))"
                    " e.closest('details').open = true; e.value = arguments[1];"
                    " e.dispatchEvent(new Event('change'))", name, value)

    def start(self, prompt=BEGINNING, **values):
        self.fill(**{"prompt": prompt, "rhyme": "", "verses": "2", **values})
        self.js("sent.length = growths = 0")
        self.one("#write").click()

    def write(self, prompt=BEGINNING, **values):
        self.start(prompt, **values)
        self.written()

    def answer(self, *events):
        """From now on a stream of these events answers the page. It stays open until the page cancels it."""
        blocks = ["data: " + (e if isinstance(e, str) else json.dumps(e)) + "\n\n" for e in events]
        self.js("""
            const blocks = arguments[0], original = window.fetch;
            window.cancelled = false;
            window.fetch = (url, options) => url !== '/v1/completions' ? original(url, options)
                : Promise.resolve(new Response(new ReadableStream({
                    start(c) { for (const b of blocks) c.enqueue(new TextEncoder().encode(b)); },
                    cancel() { window.cancelled = true; },
                  })));""", blocks)

    def said(self):
        """What screen readers were told."""
        return self.js("return [...document.querySelectorAll('#live p')].map(p => p.textContent)")

    def written(self):
        wait_for("the end of the poem", lambda: not self.one("#stop").is_enabled())

    def text(self):
        """The poem: a TAB between hemistichs, lines of verses."""
        return "\n".join(self.js("return [...document.querySelectorAll('.verse')].map(v => v.textContent)"))

    def sent(self, path="/v1/completions"):
        return [body for url, body in self.js("return sent") if url == path]

    def units(self):
        """The units of the poem, as page.js has them."""
        return self.js("return panels[0].poem.units")

    def token(self, i):
        """The i-th of the model's tokens that have letters."""
        return [t for t in self.all(".token")[:2 * i + 20] if re.search("[ء-ي]", t.text)][i]

    def click_token(self, i):
        """Clicks it; while the page is laid out anew it may have no size for a moment."""
        def clicked():
            try:
                self.token(i).click()
                return True
            except (ElementNotInteractableException, StaleElementReferenceException, IndexError):
                return False
        wait_for("a click on a token", clicked)

    def box(self, selector):
        """Where the text of an element stands."""
        return self.js("const r = document.createRange(); r.selectNodeContents(document.querySelector("
                       "arguments[0])); return r.getBoundingClientRect().toJSON()", selector)


# ---------------------------------------------------------------------------------------------

@test("a poem streams letter by letter into two columns, the first on the right")
def _(page):
    page.write(verses="3")
    check(page.js("return growths") >= 3, "the poem grew", page.js("return growths"), "times")
    check(page.text().startswith(BEGINNING.replace(" * ", "\t")), page.text())
    check(len(page.text().split("\n")) == 3, page.text())
    first, second = page.box(".verse .hemistich"), page.box(".verse .second")
    check(first["left"] > second["right"] and abs(first["top"] - second["top"]) < 1, first, second)


@test("the words of a column begin and end in one line, but for a long or a short hemistich")
def _(page):
    verse = "أرعى النجوم كأنهن لآلئ\tنثرت على ثوب الظلام ترصع\n"
    text = verse + "سكن الأنام ونام كل مسهد\tوبقيت وحدي أسمع\n" + verse[:-1] * 4 + "\nيا\tليل\n"
    page.js("""panels[0].show({id: 1, units: [{text: arguments[0], others: null}], kept: 1, state: 'done',
                               request: {model: 'any', seed: 1, prompt: ''}})""", text)
    full = page.js("return [...document.querySelectorAll('.second')].map(h => h.classList.contains('full'))")
    check(full == [True, True, False, False], full)
    page.js("document.querySelectorAll('.verse')[1].querySelector('.second').id = 'other'")
    first, second = page.box(".verse .second"), page.box("#other")
    check(all(abs(first[side] - second[side]) < 2 for side in ("left", "right")), first, second)


@test("a letter shows what else was likely, and another choice goes on from the text before it")
def _(page):
    page.write(seed="7")
    span = page.token(3)
    index = int(span.get_attribute("data-unit"))
    units = page.units()
    span.click()
    rows = page.all("#choices:not([hidden]) .choice")
    percents = [float(re.search(r"\d+", e.text).group()) for e in page.all(".choice .percent")]
    check(len(rows) >= 4 and percents == sorted(percents, reverse=True) and sum(percents) <= 105, percents)
    widths = [e.size["width"] for e in page.all(".choice .bar span")]
    check(widths == sorted(widths, reverse=True) and widths[0] > 0, widths)
    other = next(i for i, (token, _) in enumerate(units[index]["others"])
                 if token != units[index]["text"] and re.fullmatch("[ء-ي]+", token))
    kept = "".join(u["text"] for u in units[:index]) + units[index]["others"][other][0]
    page.js("sent.length = 0")
    rows[other].click()
    page.written()
    check(page.text().startswith(kept), repr(kept), "is not the beginning of", repr(page.text()))
    check(len(page.text().split("\n")) == 2, page.text())
    request = page.sent()[0]
    check(request["prompt"] == kept and request["seed"] == 7, request)
    chosen = page.one(".chosen")
    check(chosen.text == units[index]["others"][other][0] and "token" in chosen.get_attribute("class"),
          chosen.text, chosen.get_attribute("class"))
    before = page.units()[index - 1]
    check(before.get("others"), "the model's letters before the choice cannot be chosen any more", before)


@test("the language changes the words, lang and dir, and stays")
def _(page):
    def shown():
        return [page.one("html").get_attribute(a) for a in ("lang", "dir")] + [page.one("#write").text]
    check(shown() == ["en", "ltr", "Write"], shown())
    page.write()
    page.start(temperature="9")
    wait_for("the error", lambda: page.all(".error"), 5)
    page.one("#language").click()
    check(shown() == ["ar", "rtl", "اكتب"], shown())
    check(page.one(".error bdi").get_attribute("lang") == "en", "the server speaks English")
    label = page.one(".poem [tabindex]").get_attribute("aria-label")
    check("اضغط" in label and "يقول" in page.one(".error").text, label, page.one(".error").text)
    page.open(keep_poems=True)
    check(shown() == ["ar", "rtl", "اكتب"], "loaded again:", shown())
    texts = page.js("return [...document.querySelectorAll('[data-word]')].map(e => e.textContent)")
    check(not [t for t in texts if re.search("[A-Za-z]{3}", t.replace("Ctrl+Enter", ""))], texts)
    page.one("#language").click()
    check(shown() == ["en", "ltr", "Write"], shown())
    agent = page.js("return navigator.userAgent")
    page.cdp("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage="ar-EG")
    page.open()
    check(shown() == ["ar", "rtl", "اكتب"], "the browser's language is Arabic:", shown())
    page.cdp("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage="en")


@test("a finished poem has its measures, and seed, in words")
def _(page):
    page.write(seed="12")
    check("12" in page.one(".caption").text, page.one(".caption").text)
    page.js("models = []; document.getElementById('model').replaceChildren()")
    page.write(seed="13")
    caption = page.models[0]["id"] + ", seed 13"
    check(page.one(".caption").text == caption, "without the models:", page.one(".caption").text)
    if not page.models[0]["measures"]:
        raise Skipped("the model has no measures")
    wait_for("the measures", lambda: "copied" in page.one(".notes").text, 10)
    check(page.sent("/v1/measures")[-1]["text"].strip() == page.text().strip(), page.sent("/v1/measures"))
    check("the beginning you gave" in page.one(".notes").text, page.one(".notes").text)
    page.write(prompt="")
    wait_for("the measures", lambda: "words occur" in page.one(".notes").text, 10)
    check("the beginning you gave" not in page.one(".notes").text, page.one(".notes").text)


@test("copying gives verses as lines with a TAB between hemistichs")
def _(page):
    page.write()
    page.one(".copy").click()
    wait_for("the status", lambda: page.one(".status").text == "Copied.", 5)
    copied = page.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    check(copied == page.text().strip() + "\n" and "\t" in copied.split("\n")[0], repr(copied))
    # As over http from another machine.
    page.js("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.write(seed="5")
    page.one(".copy").click()
    wait_for("the status without navigator.clipboard", lambda: page.one(".status").text == "Copied.", 5)


@test("a poem is saved as text and as a picture")
def _(page):
    page.write(seed="77")
    for button, name in (".text", "poem-77.txt"), (".picture", "poem-77.png"):
        page.one(button).click()
        path = os.path.join(page.downloads, name)
        wait_for(name, lambda: os.path.exists(path) and os.path.getsize(path), 10)
        with open(path, "rb") as f:
            content = f.read()
        if name.endswith("txt"):
            check(content.decode() == page.text().strip() + "\n", content.decode())
        else:
            width, height = (int.from_bytes(content[at:at + 4], "big") for at in (16, 20))
            check(content[:4] == b"\x89PNG" and width > 400 and height > 200, content[:4], width, height)
            ink = page.driver.execute_async_script(INK, base64.b64encode(content).decode())
            check(all(pixels > 1000 for pixels in ink), "pixels of the hemistichs:", ink)


@test("a picture of a line that is longer than a canvas can be is drawn smaller")
def _(page):
    page.js("""panels[0].show({id: 1, units: [{text: 'ليل '.repeat(3000), others: null}], kept: 1,
                               state: 'done', request: {model: 'any', seed: 78, prompt: ''}})""")
    page.one(".picture").click()
    path = os.path.join(page.downloads, "poem-78.png")
    wait_for("the picture", lambda: os.path.exists(path) and os.path.getsize(path), 10)
    with open(path, "rb") as f:
        width = int.from_bytes(f.read()[16:20], "big")
    check(10000 < width <= 16384, width)


@test("stop stops, and keeps what is written")
def _(page):
    page.start(verses="100")
    wait_for("some letters", lambda: page.js("return document.querySelectorAll('.token').length > 5"))
    page.js("document.getElementById('stop').focus(); document.activeElement.click()")  # sooner than click()
    page.written()
    text = page.text()
    time.sleep(0.4)
    check(page.text() == text and len(text.split("\n")) < 100, "it went on")
    check(page.one(".status").text == "Stopped.", page.one(".status").text)
    check(page.focus() == "write", page.focus())


@test("another is written with another seed, and going on keeps the poem")
def _(page):
    page.write(seed="3")
    page.js("sent.length = 0")
    page.one("#another").click()
    page.written()
    check(page.sent()[0]["seed"] != 3 and page.text().startswith(BEGINNING.replace(" * ", "\t")), page.sent())
    text = page.text()
    page.one(".goOn").click()
    page.written()
    check(page.text().startswith(text + "\n"), repr(text), repr(page.text()))
    check(len(page.text().split("\n")) == 4, page.text())
    check(len(page.all("#poems li")) == 2, "poems kept:", len(page.all("#poems li")))


@test("going on takes the form's settings, and at most 100 verses")
def _(page):
    page.write(seed="3")
    page.fill(verses="99", seed="9", temperature="0.5", top_k="20", rhyme="auto")
    page.js("sent.length = 0")
    page.one(".goOn").click()
    request = wait_for("the request", page.sent, 5)[0]
    page.one("#stop").click()
    wanted = {"verses": 100, "seed": 9, "temperature": 0.5, "top_k": 20, "rhyme": "auto",
              "model": page.models[0]["id"]}
    check(all(request[k] == v for k, v in wanted.items()), request)
    page.written()
    page.js("""sent.length = 0;
        panels[0].show({id: 1, units: [{text: 'ليل\\n'.repeat(100), others: null}], kept: 1, state: 'done',
                        request: {model: 'any', seed: 1, prompt: '', tags: {}}})""")
    page.one(".goOn").click()
    check("100 verses" in page.one(".error").text and not page.sent(), page.sent())


@test("the history keeps poems when the page is loaded again, shows them and removes them")
def _(page):
    page.write(seed="1")
    first = page.text()
    page.write("سكن الأنام", seed="2")
    page.open(keep_poems=True)
    check(len(page.all("#poems li")) == 2, len(page.all("#poems li")))
    page.all("#poems .show")[1].click()
    check(page.text() == first, repr(page.text()), repr(first))
    check("seed 1" in page.one(".caption").text, page.one(".caption").text)
    page.one(".reuse").click()
    settings = [page.one("#" + name).get_attribute("value") for name in ("prompt", "seed", "verses")]
    check(settings == [BEGINNING, "1", "2"], settings)
    page.all("#poems .remove")[1].click()
    page.open(keep_poems=True)
    check(len(page.all("#poems li")) == 1, len(page.all("#poems li")))
    another_tab = """localStorage.setItem('arapoet.poems',
                                          JSON.stringify([...history, {...history[0], id: 5}]))"""
    page.js(another_tab)
    page.write(seed="3")
    check(len(page.all("#poems li")) == 3, "another tab's poem is lost", len(page.all("#poems li")))
    page.js(another_tab.replace("id: 5", "id: 6"))
    page.all("#poems .remove")[0].click()
    page.open(keep_poems=True)
    check(len(page.all("#poems li")) == 3, "another tab's poem is lost", len(page.all("#poems li")))
    page.js("for (let i = 0; i < 25; i++) remember({...history[0], id: i})")
    check(len(page.all("#poems li")) == 20, len(page.all("#poems li")))


@test("the keyboard reaches everything in the order of the page")
def _(page):
    page.write()
    wanted = page.js("""
        return [...document.querySelectorAll('button, input, select, textarea, summary')]
            .filter(e => e.checkVisibility() && !e.disabled).map(e => e.id || e.className || e.tagName)""")
    page.one("#language").click()
    page.one("#language").click()
    seen, poem = [page.focus()], None
    for _ in range(len(wanted) + 5):
        page.keys(Keys.TAB)
        name = page.focus()
        if "token" in name:
            poem = len(seen)
        elif name not in ("BODY", "HTML"):
            seen.append(name)
        if len(seen) == len(wanted):
            break
    check(seen == wanted, "reached", seen, "wanted", wanted)
    check(poem == wanted.index("goOn"), "the poem comes after", seen[:poem])


@test("arrows move from letter to letter, Enter and Space show choices, Escape returns")
def _(page):
    page.write()
    unit = "return Number(document.activeElement.dataset.unit)"
    page.js("document.querySelector('.poem [tabindex]').focus()")
    start = page.js(unit)
    for key, wanted in (Keys.ARROW_LEFT, 1), (Keys.ARROW_LEFT, 2), (Keys.ARROW_RIGHT, 1):
        page.keys(key)
        check(page.js(unit) == start + wanted, start, page.js(unit))
    check(len(page.all(".poem [tabindex]")) == 1, "Tab reaches", len(page.all(".poem [tabindex]")))
    row = "return [...document.querySelectorAll('.verse')].indexOf(document.activeElement.closest('.verse'))"
    for key, wanted in (Keys.ARROW_DOWN, 1), (Keys.ARROW_UP, 0), (Keys.END, 1), (Keys.HOME, 0):
        page.keys(key)
        check(page.js(row) == wanted, key, page.js(row))
    here = page.js(unit)
    for key in Keys.ENTER, Keys.SPACE:
        page.keys(key)
        check(page.one("#choices").is_displayed() and page.focus() == "choice", page.focus())
        page.keys(Keys.ESCAPE)
        check(not page.one("#choices").is_displayed() and page.js(unit) == here, page.focus())
    page.keys(Keys.ENTER)
    page.keys(Keys.ARROW_DOWN)
    page.js("sent.length = 0")
    page.keys(Keys.ENTER)
    page.written()
    check(len(page.sent()) == 1 and "chosen" in page.focus(), page.focus())


@test("choices that are all pieces of letters are closed by keys, too")
def _(page):
    page.js("""panels[0].show({id: 1, units: [{text: 'ب', others: [['bytes:\\\\xD9', -0.1]]}], kept: 0,
                               state: 'done', request: {model: 'any', seed: 1, prompt: ''}})""")
    page.js("document.querySelector('.token').focus()")
    for key in Keys.ESCAPE, Keys.TAB:
        page.keys(Keys.ENTER)
        check(page.one("#choices").is_displayed() and page.focus() == "choices", page.focus())
        page.keys(Keys.ARROW_DOWN)
        page.keys(key)
        check(not page.one("#choices").is_displayed() and "token" in page.focus(), page.focus())
    log = [e["message"] for e in page.driver.get_log("browser")]
    check(not [m for m in log if "Uncaught" in m], log)


@test("the settings are sent: rhyme, verses in either digits, tags, seed, the rest")
def _(page):
    page.write("قفا نبك / من ذكرى", verses="٢", rhyme="letters", letters="ع", seed="5", temperature="٠٫٧",
               top_k="30", top_p="0.9", repetition_penalty="1.1")
    wanted = {"prompt": "قفا نبك\tمن ذكرى", "verses": 2, "rhyme": "ع", "seed": 5, "temperature": 0.7,
              "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.1, "stream": True, "tags": {},
              "model": page.models[0]["id"]}
    request = page.sent()[0]
    check(all(request[k] == v for k, v in wanted.items()), request)
    page.write(rhyme="auto", seed="")
    check(page.sent()[0]["rhyme"] == "auto" and page.sent()[0]["seed"] != 5, page.sent())
    page.write(verses="-1")  # max_tokens is right, so that the server's error is about verses
    check(page.sent()[0]["verses"] == -1 and page.sent()[0]["max_tokens"] == 4000, page.sent())
    most = page.js("""return ['1.234', 'many', '3', '100'].map(verses => {
        document.getElementById('verses').value = verses; return readForm().max_tokens; })""")
    check(most == [4000, 4000, 600, 16384], most)
    tags = page.models[0]["tags"]
    if tags:
        name, values = next(iter(tags.items()))
        page.write(**{"tag-" + name: values[0]})
        check(page.sent()[0]["tags"] == {name: values[0]}, page.sent())


@test("verses that do not rhyme are named and marked")
def _(page):
    page.write()
    page.js("panels[0].poem.rhyme = {letters: 'ع', redraws: 12, unrhymed: [2]}; panels[0].drawNotes()")
    notes = page.one(".notes").text
    check("Verses not rhyming in \u2068ع\u2069: 2." in notes and "12" in notes, notes)
    marked = ["unrhymed" in v.get_attribute("class") for v in page.all(".verse")]
    check(marked == [False, True], marked)


@test("a rhyme without its letters is asked for, and nothing is written")
def _(page):
    page.start(rhyme="letters", letters=" ")
    error = wait_for("the error", lambda: page.all("#letters ~ .error"), 5)[0]
    check("letter" in error.text and page.focus() == "letters" and not page.sent(), error.text, page.sent())
    page.one("#language").click()
    check("اكتب هنا" in error.text, error.text)


@test("a token that is a piece of a letter is one with the rest of the letter")
def _(page):
    units = page.js("""const units = new Units(), all = [], other = {'\\ufffd': -0.5, 'ب': -1};
        for (const [text, tokens] of [['قف', ['قف']], ['', ['\\ufffd']], ['قا', ['\\ufffd', 'ا']],
                                      ['', ['bytes:\\\\xD9']], ['قا', ['bytes:\\\\x82', 'ا']],
                                      ['ب\\n', ['ب', '\\n']]])
          all.push(...units.of(text, {tokens, top_logprobs: tokens.map(() => other)}));
        return all.map(u => [u.text, u.others.length]);""")
    check(units == [["قف", 2], ["ق", 2], ["ا", 2], ["ق", 2], ["ا", 2], ["ب", 2], ["\n", 2]],
          units)
    names = page.js("return ['\\ufffd', 'bytes:\\\\xD9'].map(tokenName)")
    check(names == ["part of a letter"] * 2, names)


@test("blanks and ends have names among the choices, and any word may be a token")
def _(page):
    tokens = [" ", "\t", "\n", "<|endoftext|>", "قف نا", "constructor", "toString", "__proto__"]
    names = page.js("return arguments[0].map(tokenName)", tokens)
    wanted = ["space", "second hemistich", "end of the verse", "end of the poem", "قف·نا"]
    check(names == wanted + tokens[-3:], names)


@test("letters that the network cuts in two arrive whole")
def _(page):
    found = page.driver.execute_async_script("""
        const blocks = ['data: {"a":"قفا نبك"}\\n\\n', 'data: {"a":"من"}\\r\\n\\r\\n', 'data: [DONE]\\n\\n'];
        const bytes = new TextEncoder().encode(blocks.join(''));
        const stream = new ReadableStream({start(c) {
          for (const b of bytes) c.enqueue(Uint8Array.of(b));
          c.close();
        }});
        (async () => { const all = []; for await (const e of events(stream)) all.push(e.a); return all; })()
            .then(arguments[0]);""")
    check(found == ["قفا نبك", "من"], found)


@test("screen readers are told finished verses but not letters, then the end and the notes")
def _(page):
    page.start(verses="3")
    wait_for("some letters", lambda: len(page.all(".token")) > 2)
    page.written()
    live = page.one("#live")
    check(live.get_attribute("aria-live") == "polite" and live.get_attribute("role") == "log")
    wanted = [v.replace("\t", "، ") for v in page.text().split("\n")] + ["The poem has ended."]
    check(page.said()[:4] == wanted, page.said(), wanted)
    if page.models[0]["measures"]:
        wait_for("the measures", lambda: page.all(".notes q"), 10)
        notes = page.js("return [...document.querySelectorAll('.notes li')].map(li => li.textContent)")
        check(page.said()[4:] == notes, page.said()[4:], notes)
    page.js("setLanguage('ar')")
    rhyme = {"letters": "ع", "redraws": 7, "unrhymed": [2]}
    page.answer({"choices": [{"text": "ليل\tطويل\nصبح"}]},
                {"choices": [{"text": "\tقريب", "finish_reason": "stop", "rhyme": rhyme}]}, "[DONE]")
    page.write(prompt="")
    check(page.said()[:3] == ["ليل، طويل", "صبح، قريب", "انتهت القصيدة."], page.said())
    check("7" in page.said()[3] and "ع: 2" in page.said()[4], page.said())
    languages = page.js("return [...document.querySelectorAll('#live p')].map(p => p.lang)")
    check(languages[:5] == ["ar"] * 5, languages)


@test("a phone's page stacks the hemistichs, the second indented, and does not scroll sideways")
def _(page):
    for language in "en", "ar":
        page.size(390, 844)
        page.js("setLanguage(arguments[0])", language)
        page.write(temperature="0.8")
        first, second = page.box(".verse .hemistich"), page.box(".verse .second")
        check(second["top"] > first["top"] + 10 and second["right"] < first["right"] - 20, first, second)
        for state in "poem", "choices":
            width = page.js("return Math.max(innerWidth, document.documentElement.scrollWidth)")
            check(width == 390, language, state, width)
            page.click_token(1)


@test("an error of the server is shown at its field, and the poem stays")
def _(page):
    page.write()
    text = page.text()
    page.start(temperature="9")
    message = wait_for("the error", lambda: page.all("#temperature ~ .error"), 5)[0].text
    check("9" in message and page.focus() == "temperature", message, page.focus())
    check(page.one("#temperature").get_attribute("aria-invalid") == "true")
    check(page.text() == text, page.text())
    for number in "1e999", "Infinity", "warm":
        page.js("clearErrors()")
        page.start(temperature=number)
        wait_for(f"the error at {number}", lambda: page.all("#temperature ~ .error"), 5)
    page.start("Shall I compare thee", temperature="0.8")
    page.written()  # or refused, where the model has Arabic letters only
    check(not page.all("#temperature ~ .error"), "the error stayed")
    check(len(page.all("#prompt ~ .error")) == len(page.all(".error")), "the error is not at its field")
    page.write()
    check(not page.all(".error") and not page.all("[aria-invalid]"), "the error stayed")


@test("the prompt that the server cleaned replaces the reader's, whether all events have it or the first")
def _(page):
    texts = ["", " طويل", " جدا\n"]  # a piece of a letter has no text yet
    for events in 1, 3:
        stream = [{"choices": [{"text": text}]} for text in texts]
        for event in stream[:events]:
            event["prompt"] = "ليل"
        stream[-1]["choices"][0]["finish_reason"] = "stop"
        page.answer(*stream, "[DONE]")
        page.write(prompt="لَيْل")
        check(page.text() == "ليل طويل جدا" and page.one(".given").text == "ليل", page.text())


@test("a busy server is asked again")
def _(page):
    page.js("""
        const original = window.fetch, busy = '{"error":{"message":"busy","param":null}}';
        let tries = 0;
        window.fetch = (...request) => tries++ ? original(...request)
            : Promise.resolve(new Response(busy, {status: 429, headers: {'Retry-After': '1'}}))""")
    page.start()
    wait_for("the word", lambda: "busy" in page.one(".status").text, 3)
    page.written()
    check(len(page.text().split("\n")) == 2 and not page.all(".error"), page.text())


@test("two models write side by side with one prompt and seed")
def _(page):
    if len(page.models) < 2:
        raise Skipped("the server has one model")
    page.one("#compare").click()
    page.write()
    a, b = page.sent()
    check((a["prompt"], a["seed"]) == (b["prompt"], b["seed"]) and a["model"] != b["model"], a, b)
    boxes = [p.rect for p in page.all(".panel")]
    check(len(boxes) == 2 and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"], boxes)
    check(all(t.text for t in page.all(".panel .poem")))
    labels = [p.get_attribute("aria-label").split(",")[0] for p in page.all(".panel")]
    check(labels == [a["model"], b["model"]], labels)


@test("text has contrast AA in light and dark, and nothing moves for those who want it so")
def _(page):
    page.prefer(color_scheme="light", reduced_motion="reduce")
    page.write()
    page.token(0).click()
    moves = "return getComputedStyle(document.querySelector('.token')).animationName !== 'none'"
    check(not page.js(moves), "letters fade in")
    for scheme in "light", "dark":
        page.prefer(color_scheme=scheme, reduced_motion="reduce")
        colors = page.js("const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]")
        ink, paper = (sum(map(int, re.findall(r"\d+", color)[:3])) for color in colors)
        check((ink < paper) == (scheme == "light"), scheme, ink, paper)
        low = page.js(CONTRAST)
        check(not low, scheme, low)
    page.prefer()


@test("every field has a label and its hint, and every button a name")
def _(page):
    page.write()
    nameless = page.js("""
        const named = e => e.labels?.[0]?.textContent || e.getAttribute('aria-label') ||
            e.matches('button') && e.textContent.trim();
        return [...document.querySelectorAll('input, select, textarea, button')].filter(e => !named(e))
            .map(e => e.outerHTML)""")
    check(not nameless, nameless)
    hints = page.js("""
        return [...document.querySelectorAll('[aria-describedby]')].map(
            e => [e.id, document.getElementById(e.getAttribute('aria-describedby'))?.textContent.trim()])""")
    check(len(hints) == 7 and all(hint for _, hint in hints), hints)
    for width in 1280, 390:
        page.size(width, 900)
        check(("Ctrl+Enter" in page.one("#prompt-hint").text) == (width == 1280), width)


@test("Ctrl+Enter in the beginning writes, and with 0 verses the model ends the poem")
def _(page):
    page.fill(prompt="ليل", verses="0")
    page.one("#prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    wait_for("the request", page.sent, 5)
    page.one("#stop").click()
    check(page.sent()[0]["verses"] == 0 and page.sent()[0]["prompt"] == "ليل", page.sent())


@test("the page is three small files, takes nothing from elsewhere and breaks no security policy")
def _(page):
    page.write()
    origins = page.js("return performance.getEntriesByType('resource').map(e => new URL(e.name).origin)")
    check(set(origins) == {page.url}, origins)
    log = [e["message"] for e in page.driver.get_log("browser")]
    check(not [m for m in log if "Content Security Policy" in m or "Uncaught" in m], log)
    size = 0
    for name in "page.html", "page.css", "page.js":
        with open(os.path.join(FOLDER, name), encoding="utf-8") as f:
            text = f.read()
        size += len(text.encode())
        for unsafe in (r"(inner|outer)HTML", "insertAdjacentHTML", r"document\.write", r"eval\(", "'style'",
                       "<style", "style=", r"\son\w+=", "<script>", "https?://"):
            check(not re.search(unsafe, text), name, "has", unsafe)
    check(size < LIMIT, size, "bytes")


@test("a lost server is told kindly, and trying again writes the poem")
def _(page):
    page.offline(True)
    for _ in range(2):
        page.start()
        wait_for("the notice", lambda: page.one("#lost").is_displayed(), 5)
    check("does not answer" in page.one("#lost").text and page.one("#lost").get_attribute("role") == "alert")
    page.offline(False)
    page.js("sent.length = 0")
    page.one("#retry").click()
    check(page.focus() == "write", "the focus went with the notice:", page.focus())
    wait_for("the poem", lambda: len(page.text().split("\n")) == 2)
    page.written()
    check(not page.one("#lost").is_displayed() and len(page.sent()) == 1, page.sent())


@test("each panel has its own retry, which goes with the panel")
def _(page):
    page.js("setPanels(2); window.tried = []; showLost(panels[0], () => tried.push(0));"
            "for (const n of [1, 2]) showLost(panels[1], () => tried.push(n)); found(panels[0])")
    check(page.one("#lost").is_displayed(), "one panel's answer hides the other's notice")
    page.one("#retry").click()
    check(page.js("return tried") == [2], page.js("return tried"))
    page.js("showLost(panels[1], () => tried.push(3)); setPanels(1)")
    check(not page.one("#lost").is_displayed(), "the removed panel's notice is still there")


@test("a fault of the page is not taken for a lost server")
def _(page):
    page.js("panels[0].columns.add = () => { throw new TypeError('a fault') }")
    page.start(prompt="")
    error = wait_for("the error", lambda: page.all(".error"), 5)[0].text
    check("page failed" in error and not page.one("#lost").is_displayed(), error)
    log = [e["message"] for e in page.driver.get_log("browser")]
    check([m for m in log if "a fault" in m], log)
    page.answer({"choices": [{"text": "ليل"}]})
    page.start(prompt="")
    wait_for("the stream's end", lambda: page.js("return cancelled"), 5)


@test("a server that dies while it writes leaves the text, and the notice")
def _(page):
    if not page.server:
        raise Skipped("needs --command")
    page.start(verses="100")
    wait_for("some letters", lambda: len(page.all(".token")) > 5)
    page.server.stop()
    wait_for("the notice", lambda: page.one("#lost").is_displayed(), 10)
    check(page.text().startswith(BEGINNING.replace(" * ", "\t")) and len(page.all(".token")) > 5, page.text())
    check("broke" in page.one(".status").text, page.one(".status").text)
    check(len(page.all("#poems li")) == 1)


# ---------------------------------------------------------------------------------------------

def screenshots(page, folder):
    """The page in both languages and colours, on a desk and a phone."""
    os.makedirs(folder, exist_ok=True)
    for language in "ar", "en":
        for scheme in "light", "dark":
            for device, width, height in ("desk", 1280, 900), ("phone", 390, 844):
                page.size(width, height)
                page.prefer(color_scheme=scheme, reduced_motion="reduce")
                page.open()
                page.js("setLanguage(arguments[0])", language)
                page.write(verses="5", rhyme="auto")
                time.sleep(0.3)
                page.driver.save_screenshot(os.path.join(folder, f"{device}-{language}-{scheme}.png"))


def run(page, only):
    passed = failed = 0
    for promise, body in TESTS:
        if only not in promise:
            continue
        started = time.monotonic()
        try:
            page.size(1280, 900)
            page.prefer()
            page.open()
            body(page)
            passed += 1
            print(f"ok       {promise} ({time.monotonic() - started:.1f} s)", flush=True)
        except Skipped as reason:
            print(f"skipped  {promise}: {reason}", flush=True)
        except Exception as error:
            failed += 1
            where = traceback.extract_tb(error.__traceback__)
            lines = [f.lineno for f in where if f.name == "_"]
            reason = str(error).split("\nStacktrace")[0]
            print(f"FAILED   {promise}\n         line {lines[-1:]}: {reason}", flush=True)
    return passed, failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--server", help="the address of a server that runs")
    parser.add_argument("--command", help="starts a server, which prints its address")
    parser.add_argument("--screenshots", metavar="DIR", help="also writes pictures of the page there")
    parser.add_argument("--only", default="", metavar="WORD", help="the tests whose promise has this word")
    flags = parser.parse_args()
    if bool(flags.server) == bool(flags.command):
        parser.error("wanted: either --server or --command")
    server = page = None
    try:
        with tempfile.TemporaryDirectory() as second, tempfile.TemporaryDirectory() as downloads:
            if flags.command:
                server = Server(with_two_models(flags.command, second))
            page = Page(server.url if server else flags.server.rstrip("/"), downloads)
            page.server = server
            if flags.screenshots:
                screenshots(page, flags.screenshots)
            passed, failed = run(page, flags.only)
    finally:
        if page:
            page.driver.quit()
        if server:
            server.stop()
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
