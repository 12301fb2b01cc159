"""A Gradio app for a bank of experts, on a laptop or as a Hugging Face Space: both answers side by side, and knobs.

python app.py                                  # the playground's bank: on a CPU, in seconds, without internet
python app.py --bank my-bank --port 7860       # a folder or a Hub id; in a Space set the variable BANK
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported: it asks its makers for its version
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
import page
from answers import MAX_NEW_TOKENS, Answerer, example_prompts
from handlers import Handlers, Update

from peft_svf.experts import ExpertBank, ExpertError
from peft_svf.playground import BANK_FOLDER


STEP = 0.05
AT_ONCE = 2  # answers that are computed at the same time; the others queue
QUEUE = 32
LIMITS: dict[str, Any] = {
    "concurrency_id": "model",
    "concurrency_limit": AT_ONCE,
    "api_visibility": "private",
}
HINT = "Type a prompt; Enter answers it"
ANNOUNCE = """() => {
    for (const id of ["first-pass", "adapted-answer", "mixture"])
        document.getElementById(id)?.setAttribute("aria-live", "polite");
    document.querySelector("#prompt textarea")?.setAttribute("enterkeyhint", "send");
}"""


def main(words: Sequence[str] | None = None) -> int:
    """Load the bank and serve the app until it is interrupted."""
    arguments = parse(words)
    try:
        answerer = Answerer(arguments.bank, arguments.max_new_tokens)
        serve(answerer, bank_name(arguments.bank), arguments.host, arguments.port)
    except (ExpertError, ValueError, OSError) as error:
        print(f"app.py: {error}", file=sys.stderr)
        return 1
    return 0


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments; a Space gives them as environment variables."""
    parser = argparse.ArgumentParser(description="Answers of a bank's experts, beside those of its base model.")
    parser.add_argument(
        "--bank", default=os.environ.get("BANK") or str(BANK_FOLDER), help="folder or Hub id (BANK, or the playground)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=int(os.environ.get("MAX_NEW_TOKENS") or MAX_NEW_TOKENS))
    parser.add_argument("--host", help="address to listen at (GRADIO_SERVER_NAME, or this machine alone)")
    parser.add_argument("--port", type=int, help="(GRADIO_SERVER_PORT, or the first free one from 7860)")
    return parser.parse_args(words)


def bank_name(bank: str) -> str:
    """What the page calls the bank: a Hub id, the last part of a folder's path, or "playground"."""
    return "playground" if Path(bank) == BANK_FOLDER else Path(bank).name if Path(bank).is_dir() else bank


def serve(answerer: Answerer, name: str, host: str | None, port: int | None, block: bool = True) -> gr.Blocks:
    """Start the web server; with `block=False` return while it runs."""
    blocks = layout(answerer, name)
    blocks.queue(max_size=QUEUE, api_open=False)
    _, url, _ = blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,  # it advertises share=True
        prevent_thread_lock=True,
        theme=theme(),
        css=page.STYLE,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
    )
    print(f"The app answers at {url}", flush=True)
    if block:
        blocks.block_thread()
    return blocks


def theme() -> gr.themes.Base:
    """Calm, and of fonts that every machine has: nothing is loaded from anywhere."""
    plain: Any = ["system-ui", "sans-serif"]
    return gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        radius_size="md",
        font=plain,
        font_mono=["ui-monospace", "monospace"],
    ).set(
        body_background_fill="#f6f7f9",
        body_background_fill_dark="#0e1116",
        block_background_fill_dark="#171c24",
        block_info_text_color="#515b69",
        input_background_fill_dark="#0e1116",
        button_primary_background_fill="#1d4ed8",
        button_primary_background_fill_hover="#1e40af",
        button_primary_background_fill_dark="#1d4ed8",
        button_primary_background_fill_hover_dark="#2563eb",
        button_primary_text_color="#ffffff",
        input_placeholder_color="#5b6472",
        input_placeholder_color_dark="#a3acb9",
    )


def layout(answerer: Answerer, name: str) -> gr.Blocks:
    """The page: a prompt, what the first pass says, both answers, and the knobs."""
    bank = answerer.bank
    prompts = example_prompts(bank)
    expected = answerer.measure(prompts[0] if prompts else "Hello!")
    with gr.Blocks(title=f"Transformer²: {name}", analytics_enabled=False) as blocks:
        gr.HTML(page.introduction(bank, name, expected))
        with gr.Row(elem_id="question"):
            prompt = gr.Textbox(label="Prompt", placeholder=HINT, lines=1, max_lines=8, scale=8, elem_id="prompt")
            button = gr.Button("Answer", variant="primary", scale=1, min_width=110, elem_id="answer")
        message = gr.HTML("", elem_id="message")
        with gr.Row(elem_id="examples"):
            examples = [gr.Button(text, size="sm", min_width=40) for text in prompts]
        with gr.Row():
            scores, dispatcher = first_pass(answerer)
            base, adapted = second_pass()
        with gr.Row():
            sliders, mixture, choose = knobs(bank)
            picture = lever_frame()
        asked, weights = gr.State(""), gr.State({})
        outputs = Update(message, scores, base, adapted, mixture, asked, weights)
        connect(Handlers(answerer), outputs, prompt, dispatcher, sliders, picture, [button, choose], examples)
        blocks.load(None, js=ANNOUNCE)
    return blocks


def first_pass(answerer: Answerer) -> tuple[gr.HTML, gr.Radio]:
    """The column of the dispatcher, whose choice is shown where there is one."""
    with gr.Column(min_width=250, scale=2):
        gr.HTML(page.heading("First pass", "Which expert does the prompt need?"))
        names = list(answerer.pipelines)
        dispatcher = gr.Radio(names, value=names[0], label="Dispatcher", visible=len(names) > 1, elem_id="dispatcher")
        return gr.HTML(page.note("The probability of each label appears here."), elem_id="first-pass"), dispatcher


def second_pass() -> tuple[gr.HTML, gr.HTML]:
    """The column of the two answers, side by side where there is room."""
    with gr.Column(min_width=250, scale=5):
        gr.HTML(page.heading("Second pass", "The answer without an expert, and under the route."))
        with gr.Row():
            with gr.Column(min_width=250):
                base = gr.HTML(page.panel("Base model", "", page.NO_ANSWER_YET, ""), elem_id="base-answer")
            with gr.Column(min_width=250):
                adapted = gr.HTML(
                    page.panel("Adapted", "", page.NO_ANSWER_YET, "", "adapted"), elem_id="adapted-answer"
                )
    return base, adapted


def knobs(bank: ExpertBank) -> tuple[list[gr.Slider], gr.HTML, gr.Button]:
    """The column of the sliders, one for each expert."""
    with gr.Column(min_width=250, scale=2):
        gr.HTML(page.heading("The knobs", "Mix experts by hand; the base model keeps the rest of 1."))
        sliders = [
            gr.Slider(0, 1, 0, step=STEP, label=entry.label, buttons=[], elem_id=f"knob-{name}", elem_classes="knob")
            for name, entry in bank.experts.items()
        ]
        mixture = gr.HTML(page.mixture({}, bank), elem_id="mixture")
        return sliders, mixture, gr.Button("Let it choose", elem_id="choose")


def lever_frame() -> gr.HTML:
    """The column of the levers picture."""
    with gr.Column(min_width=250, scale=5):
        gr.HTML(page.heading("The levers", "How far the route turns each group of singular values."))
        return gr.HTML(page.note("The picture of the route that answers appears here."), elem_id="levers")


def connect(
    handlers: Handlers,
    outputs: Update,
    prompt: gr.Textbox,
    dispatcher: gr.Radio,
    sliders: list[gr.Slider],
    picture: gr.HTML,
    buttons: list[gr.Button],
    examples: list[gr.Button],
) -> None:
    """Let the page's events call the handlers; the picture, which takes longest, comes after the answers."""
    asking: dict[str, Any] = LIMITS | {
        "outputs": [*outputs, *sliders],
        "show_progress_on": [outputs.scores, outputs.base, outputs.adapted],
    }
    events = [prompt.submit(handlers.ask, [prompt, dispatcher], **asking)]
    events += [button.click(handlers.ask, [prompt, dispatcher], **asking) for button in buttons]
    asking["outputs"] = [prompt, *asking["outputs"]]
    events += [example.click(handlers.ask_example, [example, dispatcher], **asking) for example in examples]
    turning: dict[str, Any] = LIMITS | {
        "outputs": list(outputs),
        "show_progress_on": [outputs.adapted],
        "trigger_mode": "always_last",
    }
    events += [slider.input(handlers.turn, [prompt, outputs.asked, *sliders], **turning) for slider in sliders]
    for event in events:
        event.then(handlers.show, outputs.weights, picture, show_progress="hidden", api_visibility="private")


if __name__ == "__main__":
    sys.exit(main())
