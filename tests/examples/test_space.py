"""`examples/space`: the app's answers are the pipeline's, and people can use its page, by keyboard and on a phone."""

from __future__ import annotations

import copy
import importlib
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import SpaceCard

from peft_svf.experts import ExpertBank, ExpertEntry
from peft_svf.pipelines import Transformer2Pipeline
from peft_svf.playground import BANK_FOLDER


gradio = pytest.importorskip("gradio", reason="the app needs gradio")

SPACE = Path(__file__).resolve().parents[2] / "examples" / "space"
MODULES = ("app", "answers", "handlers", "levers", "page")
PROMPT = "Tom has 23 apples and buys 18 more. How many apples does Tom have?"
WAIT_SECONDS = 60
HOSTILE = "<script>window.hacked=1</script><img src=x onerror='window.hacked=2'> ${window.hacked=3} {{constructor}}"
LOOPBACK = {"127.0.0.1", "localhost", "::1"}


# ---------------------------------------------------------------- the app without its page
@pytest.fixture(scope="module")
def space() -> Iterator[SimpleNamespace]:
    """The modules of the app, importable by their short names while these tests run."""
    sys.path.insert(0, str(SPACE))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    sys.path.remove(str(SPACE))
    for name in MODULES:
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def answerer(space: SimpleNamespace) -> Any:
    return space.answers.Answerer(BANK_FOLDER)


def by_hand(bank: ExpertBank, route: Any, prompt: str = PROMPT) -> str:
    """Greedy decoding under a route with the model's own generate."""
    messages = [{"role": "user", "content": prompt}]
    batch = bank.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with bank.routed(route):
        tokens = bank.model.generate(**batch, do_sample=False, max_new_tokens=64)
    return bank.tokenizer.decode(tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def test_answers_are_those_of_the_pipeline_and_of_the_routes_by_hand(answerer: Any) -> None:
    record = Transformer2Pipeline(str(BANK_FOLDER))(PROMPT)[0]
    chosen, base = answerer.chosen(PROMPT, "prompt"), answerer.base(PROMPT)
    assert (chosen.text, chosen.expert, chosen.scores) == tuple(
        record[key] for key in ("generated_text", "expert", "scores")
    )
    assert chosen.weights == {"math": 1.0} and base.weights == {} and base.scores is None
    assert chosen.text == by_hand(answerer.bank, "math") != base.text == by_hand(answerer.bank, "others")


def test_mixtures_are_those_of_the_bank_in_every_thread(answerer: Any) -> None:
    mixtures = [{"math": 0.2}, {"math": 0.3}, {"code": 1.0}, {"math": 1.0, "code": 1.0}, {"math": 0.5, "code": 0.5}]
    expected = [by_hand(answerer.bank, weights) for weights in mixtures]
    assert len(set(expected)) > 1  # or threads could mix them up unseen
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda weights: answerer.mixed(PROMPT, weights), mixtures * 2))
    assert [answer.text for answer in answers] == expected * 2
    assert answers[0].weights == {"math": 0.2}
    assert answerer.mixed(PROMPT, {"math": 0.0}).text == by_hand(answerer.bank, "others")


def test_sliders_follow_the_route_and_the_route_follows_the_sliders(space: SimpleNamespace, answerer: Any) -> None:
    handlers = space.handlers.Handlers(answerer)
    asked = handlers.ask(PROMPT, "prompt")
    update, positions = space.handlers.Update(*asked[:-3]), asked[-3:]
    assert positions == (1.0, 0.0, 0.0) and update.asked == PROMPT and update.weights == {"math": 1.0}
    assert "so 41" in re.sub("<.*?>", "", update.adapted) and "so 31" in update.base
    turned = space.handlers.Update(*handlers.turn(PROMPT, PROMPT, 0.2, 0.0, 0.0))
    assert "so 31" in turned.adapted and "0.20 math + 0.80 base model" in turned.adapted
    assert turned.scores == gradio.skip()  # the first pass has not changed
    other = space.handlers.Update(*handlers.turn("Who is Ida?", PROMPT, 0.0, 0.0, 0.0))
    assert "not asked" in other.scores and other.asked == "Who is Ida?"
    assert "subtracted" in space.page.mixture({"math": 1.0, "code": 0.5}, answerer.bank)


@pytest.mark.parametrize(
    ("prompt", "positions", "complaint"),
    [
        ("  \n", (1, 0, 0), "Type a prompt first"),
        ("x" * 4001, (1, 0, 0), "4001 characters; this app takes 4000"),
        ("word " * 100, (1, 0, 0), "the model&#x27;s context is 256; shorten the prompt"),
        (PROMPT, (float("nan"), 0, 0), "A weight is a number"),
    ],
)
def test_what_has_no_answer_gets_a_message_and_nothing_else_changes(
    space: SimpleNamespace, answerer: Any, prompt: str, positions: tuple[float, ...], complaint: str
) -> None:
    handlers = space.handlers.Handlers(answerer)
    results = [handlers.turn(prompt, "", *positions)]
    if prompt != PROMPT:
        results.append(handlers.ask(prompt, "prompt"))
    for message, *others in results:
        assert complaint in message and "role='alert'" in message
        assert all(other == gradio.skip() for other in others)


def test_answers_are_short_whatever_the_model_wants(space: SimpleNamespace, answerer: Any) -> None:
    short = space.answers.Answerer(answerer.bank, max_new_tokens=3)
    tokens = answerer.bank.tokenizer(short.chosen(PROMPT).text, add_special_tokens=False)["input_ids"]
    assert len(tokens) <= 3
    long_prompt = (PROMPT + " ") * 3  # 256 new tokens would not fit behind it
    assert answerer.chosen(long_prompt).text


def test_other_banks_have_other_knobs(space: SimpleNamespace, answerer: Any) -> None:
    model, tokenizer = answerer.bank.model, answerer.bank.tokenizer
    two = ExpertBank(model, tokenizer, {"math": ExpertEntry("sums")}, "sums or others?", classifier="code")
    answers = space.answers.Answerer(two)
    assert list(answers.pipelines) == ["classifier", "prompt"]
    assert {*answers.chosen(PROMPT, "classifier").scores} == {*answers.chosen(PROMPT, "prompt").scores}
    assert answers.chosen(PROMPT, "classifier").scores != answers.chosen(PROMPT, "prompt").scores
    with pytest.raises(ValueError, match="choose classifier or prompt"):
        answers.chosen(PROMPT, "another")
    labels = [part.get("props", {}).get("label") for part in space.app.layout(answers, "two").config["components"]]
    assert "sums" in labels and "reasoning" not in labels
    none = space.answers.Answerer(ExpertBank.from_pretrained(BANK_FOLDER).model.unload())
    assert none.chosen(PROMPT).text == answerer.base(PROMPT).text
    assert not space.answers.example_prompts(none.bank)
    assert space.app.layout(none, "none")


def test_levers_are_those_of_the_mixture(space: SimpleNamespace, answerer: Any) -> None:
    bank = answerer.bank
    mixed = space.levers.mixed_expert(bank, {"math": 0.5, "code": 0.25})
    layers = dict(bank.base_model.named_modules())
    for name in list(mixed.offsets)[::7]:
        expected = 0.5 * layers[name].offset("math") + 0.25 * layers[name].offset("code")
        assert (mixed.offsets[name] - expected).abs().max() < 1e-6
    assert "answered alone" in space.levers.levers(bank, {})


def test_text_from_outside_is_only_text(space: SimpleNamespace) -> None:
    escaped = space.page.escape(HOSTILE)
    assert "<" not in escaped
    assert space.page.marked(HOSTILE, HOSTILE) == escaped
    assert re.sub("</?mark>", "", space.page.marked(HOSTILE, "so 41")) == escaped
    assert space.page.marked("so 41", "so 31") == "so <mark>41</mark>"


def test_bank_that_does_not_load_is_one_line(
    space: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert space.app.main(["--bank", str(tmp_path)]) == 1
    message = capsys.readouterr().err.strip()
    assert message.startswith("app.py: ") and str(tmp_path) in message and "\n" not in message


def test_readme_makes_it_a_space() -> None:
    card = SpaceCard.load(SPACE / "README.md").data
    assert (card.sdk, card.license) == ("gradio", "apache-2.0") and (SPACE / card.app_file).is_file()
    assert card.sdk_version.split(".")[0] == gradio.__version__.split(".")[0]
    assert len(card.short_description) <= 60  # the Hub's limit


# ---------------------------------------------------------------- the page
@pytest.fixture(scope="module")
def looked_up() -> Iterator[set[str]]:
    """The hosts that this process looks up or connects to while the app runs."""
    hosts: set[str] = set()
    patch = pytest.MonkeyPatch()
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def seen_connect(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple):
            hosts.add(str(address[0]))
        return connect(self, address)

    def seen_look_up(host: Any, *arguments: Any, **options: Any) -> Any:
        hosts.add(str(host))
        return look_up(host, *arguments, **options)

    patch.setattr(socket.socket, "connect", seen_connect)
    patch.setattr(socket, "getaddrinfo", seen_look_up)
    yield hosts
    patch.undo()


@pytest.fixture(scope="module")
def serve(space: SimpleNamespace, looked_up: set[str]) -> Iterator[Callable[..., str]]:
    """Start an app; returns its address."""
    running = []

    def start(answerer: Any, name: str) -> str:
        blocks = space.app.serve(answerer, name, "127.0.0.1", None, block=False)
        running.append(blocks)
        return str(blocks.local_url)

    yield start
    for blocks in running:
        blocks.close(verbose=False)


@pytest.fixture(scope="module")
def tools() -> Iterator[Any]:
    """The module space_browser, which lies beside this file."""
    pytest.importorskip("selenium", reason="the page is tested with selenium")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield importlib.import_module("space_browser")


@pytest.fixture(scope="module")
def browser(tools: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if None in tools.programs():
        pytest.skip("the page is tested in chromium: apt install chromium chromium-driver")
    driver = tools.open_browser(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


class Page:
    """The app in the browser, as a visitor sees it."""

    def __init__(self, browser: Any, tools: Any, url: str, screenshots: Path) -> None:
        self.browser, self.tools, self.url, self.screenshots = browser, tools, url, screenshots

    def open(self, width: int, height: int, dark: bool = False, url: str | None = None) -> None:
        self.tools.resize(self.browser, width, height, dark)
        self.browser.get(url or self.url)
        self.wait(lambda: self.browser.execute_script("return !!document.querySelector('#adapted-answer[aria-live]')"))

    def text(self, part: str) -> str:
        return str(self.browser.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", part))

    def wait(self, condition: Callable[[], Any]) -> None:
        end = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert time.monotonic() < end, self.text("body")
            time.sleep(0.05)

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.browser).send_keys(*keys).perform()

    def tab_to(self, part: str) -> None:
        """Press Tab until this part has the focus, as somebody without a mouse does."""
        from selenium.webdriver.common.keys import Keys

        for _ in range(40):
            if self.browser.execute_script("return document.activeElement.matches(arguments[0])", part):
                return
            self.press(Keys.TAB)
        raise AssertionError(f"Tab does not reach {part}")

    def ask(self, prompt: str, *end: str) -> None:
        from selenium.webdriver.common.keys import Keys

        self.tab_to("#prompt textarea")
        self.press(prompt, *(end or (Keys.ENTER,)))
        self.wait(lambda: self.text("#first-pass .route"))

    def answer(self, part: str) -> str:
        return self.text(f"{part} pre").strip()

    def shot(self, name: str) -> Path:
        path = self.screenshots / name
        self.tools.take_screenshot(self.browser, path)
        return path


@pytest.fixture(scope="module")
def page(
    browser: Any, tools: Any, answerer: Any, serve: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Page]:
    kept = os.environ.get("SPACE_SCREENSHOTS")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    yield Page(browser, tools, serve(answerer, "playground"), folder)


@pytest.mark.slow
def test_by_keyboard_alone_ask_turn_a_knob_and_let_it_choose(page: Page, answerer: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    page.open(1200, 900)
    page.ask(PROMPT)
    assert page.text("#first-pass .chosen").split() == ["math", "✓", "chosen", ">", "99.9", "%"]
    assert page.text("#first-pass .route") == "Route: math"
    assert page.answer("#base-answer") == answerer.base(PROMPT).text == "3+8=11, 2+1=3, so 31"
    assert page.answer("#adapted-answer") == answerer.chosen(PROMPT).text == "3+8=11, 2+1+1=4, so 41"
    page.wait(lambda: page.browser.execute_script("return document.querySelector('#levers img')?.naturalWidth > 100"))
    assert page.shot("desktop.png").stat().st_size > 20_000

    page.tab_to("#knob-math input[type=range]")
    page.press(*[Keys.ARROW_LEFT] * 16)
    page.wait(lambda: "0.20 math + 0.80 base model" in page.text("#adapted-answer"))
    assert page.answer("#adapted-answer") == by_hand(answerer.bank, {"math": 0.2}) == "3+8=11, 2+1=3, so 31"
    assert "math 0.20" in page.text("#mixture")

    page.tab_to("#choose")
    page.press(Keys.ENTER)
    page.wait(lambda: page.answer("#adapted-answer").endswith("so 41"))
    knob = "return document.querySelector('#knob-math input[type=range]').value"
    page.wait(lambda: page.browser.execute_script(knob) == "1")


@pytest.mark.slow
def test_examples_and_the_keyboard_shortcut_answer(page: Page, space: SimpleNamespace, answerer: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    page.open(1200, 900)
    page.ask("Who is Ida?", Keys.CONTROL + Keys.ENTER)
    assert page.text("#first-pass .route") == "Route: base model"
    example = space.answers.example_prompts(answerer.bank)[2]
    page.tab_to("#examples button:nth-of-type(3)")
    page.press(Keys.SPACE)
    page.wait(lambda: page.text("#first-pass .route") == "Route: code")
    assert page.answer("#adapted-answer") == answerer.chosen(example).text != page.answer("#base-answer")
    assert page.browser.execute_script("return document.querySelector('#prompt textarea').value") == example


@pytest.mark.slow
def test_hostile_text_is_shown_as_text(
    page: Page, space: SimpleNamespace, answerer: Any, serve: Callable[..., str]
) -> None:
    bank = copy.copy(answerer.bank)
    bank.experts = {**bank.experts, "code": ExpertEntry(f"code {HOSTILE}", HOSTILE)}
    hostile = space.answers.Answerer(bank)
    for pipe in hostile.pipelines.values():  # a model that writes what an attacker wants
        told = pipe.postprocess
        pipe.postprocess = lambda *a, told=told, **k: [r | {"generated_text": HOSTILE} for r in told(*a, **k)]
    page.open(1200, 900, url=serve(hostile, HOSTILE))
    page.browser.execute_script("document.querySelector('header details').open = true")
    page.ask("<script>window.hacked=4</script>")
    assert page.answer("#base-answer") == page.answer("#adapted-answer") == HOSTILE
    for part in ("header ul", "header summary", "#first-pass .scores", "#knob-code"):
        assert HOSTILE in page.text(part)
    assert page.browser.execute_script("return window.hacked") is None
    assert not page.browser.execute_script("return document.querySelectorAll('.gradio-container img').length")


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_phone_shows_all_without_sideways_scrolling(page: Page, dark: bool) -> None:
    page.open(375, 812, dark)
    page.ask(PROMPT)
    page.wait(lambda: page.browser.execute_script("return document.querySelector('#levers img')?.naturalWidth > 100"))
    page.wait(lambda: page.browser.execute_script("return !document.querySelector('.translucent:not(.hide)')"))
    page.shot("phone-dark.png" if dark else "phone.png")
    width = "return Math.max(document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth)"
    assert page.browser.execute_script(width) == 375
    assert page.browser.execute_script("return document.body.classList.contains('dark')") is dark
    time.sleep(0.4)  # transitions of colours
    assert page.browser.execute_script(page.tools.FAINT_TEXT) == []


@pytest.mark.slow
def test_every_control_has_a_name_and_the_page_a_language(page: Page) -> None:
    page.open(1200, 900)
    controls = page.browser.execute_script(page.tools.NAMES_OF_CONTROLS)
    assert len(controls) >= 2 + 7 + 6 + 1  # prompt and button, examples, two inputs a knob, "let it choose"
    assert all(name for _, name in controls)
    assert page.browser.execute_script("return document.documentElement.lang") == "en"


@pytest.mark.slow
def test_nothing_but_this_machine_is_asked(page: Page, looked_up: set[str]) -> None:
    page.open(1200, 900)
    asked = page.tools.requested_hosts(page.browser)  # of all tests so far, too
    assert asked and asked <= LOOPBACK
    assert looked_up and looked_up <= LOOPBACK
