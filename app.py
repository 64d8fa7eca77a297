"""The demo of LLaVA-VR: ask about a picture, choose the number of image tokens, see where the model looks again.

It opens in a browser, and runs as a Gradio Space of the Hub as it is: see docs/demo.md.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import gradio as gr
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer
from transformers.dynamic_module_utils import get_class_from_dynamic_module


ROOT = Path(__file__).resolve().parent
EXAMPLES = """examples:
  python app.py
  python app.py --model path/to/another/checkpoint --port 8000
"""
SAMPLES = {
    "examples/receipt.png": "how much is the salad?",
    "docs/samples/table.png": "What is d of cod?",
    "docs/samples/chart.png": "Which is highest?",
    "docs/samples/ocr.png": "What is written here?",
}
INTRODUCTION = """# LLaVA-VR
Many image patches become few image tokens; between the layers of the decoder these tokens look at the image again. The
maps show where. The nano checkpoint reads drawn lines of text, tables, charts and price lists, in English; about
photographs it answers with confidence and without sense."""
COLUMNS = {  # of the table of runs, with their widths in pixels
    "s": 50,
    "image tokens": 90,
    "first token (ms)": 90,
    "answer (ms)": 90,
    "question": 320,
    "answer": 560,
}
answer_maps, draw_map = (
    get_class_from_dynamic_module(f"maps_llava_vr.{name}", str(ROOT)) for name in ("answer_maps", "draw_map")
)


class TimedStreamer(TextIteratorStreamer):
    """Streams the answer's text, and keeps when its first token came."""

    first_token: float | None = None

    def put(self, value: torch.Tensor):
        if not self.next_tokens_are_prompt and self.first_token is None:
            self.first_token = time.perf_counter()
        super().put(value)


def read_upload(read: Callable[[Any], str | None], upload: Any) -> str | None:
    """What Gradio reads of an uploaded picture, or a message in place of its own error."""
    try:
        return read(upload)
    except OSError as error:
        raise gr.Error("This file is no picture that can be read.") from error


class Demo:
    """A model, and what the page calls."""

    def __init__(self, name: str):
        self.processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
        self.model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True).eval()
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.choices = sorted(self.model.config.downsamples)
        blank = Image.new("RGB", (64, 64))
        self.model.generate(**self.encode(blank, "?", self.choices[0]), max_new_tokens=2)  # the first call is slow

    def encode(self, picture: str | Image.Image | None, question: str, s: int) -> dict[str, torch.Tensor]:
        if picture is None:
            raise gr.Error("Upload a picture or pick an example first.")
        if not question.strip():
            raise gr.Error("Type a question first.")
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        try:
            return self.processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"projector_downsample": s},
            ).to(self.model.device)
        except (OSError, ValueError) as error:
            raise gr.Error(str(error)) from error

    def ask(self, picture: str | None, question: str, s: int, runs: list[list]) -> Iterator[tuple[Any, ...]]:
        """The answer as it comes; at its end also all runs, for the table, and a map for each module."""
        s, start = min(self.choices, key=lambda choice: abs(choice - s)), time.perf_counter()
        inputs, layers = self.encode(picture, question, s), self.model.config.remember_layers
        streamer, done = TimedStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True), {}

        def generate():
            try:
                done["sequences"] = self.model.generate(
                    **inputs, max_new_tokens=200, do_sample=False, streamer=streamer
                )
            except Exception as error:  # to be shown on the page
                done["error"] = error
                streamer.end()

        thread = Thread(target=generate)
        thread.start()
        answer = ""
        for piece in streamer:
            answer += piece
            yield answer, runs, runs, *[None] * len(layers)
        thread.join()
        if "error" in done:
            raise gr.Error(str(done["error"]))
        moments = (streamer.first_token, time.perf_counter())
        tokens = int((inputs["input_ids"] == self.model.config.image_token_id).sum())
        runs = [[s, tokens, *(round(1000 * (moment - start)) for moment in moments), question, answer], *runs]
        if layers and self.model.config.window_size(s):
            (maps,) = answer_maps(done["sequences"], inputs, self.model, self.processor)
            drawn = [draw_map(picture, maps[layer]) for layer in layers]
        else:  # every patch is a token, and no module runs
            drawn = [None] * len(layers)
        yield answer, runs, runs, *drawn

    def page(self) -> gr.Blocks:
        with gr.Blocks(title="LLaVA-VR") as page:
            gr.Markdown(INTRODUCTION)
            runs = gr.State([])
            with gr.Row():
                with gr.Column():
                    picture = gr.Image(type="filepath", label="Picture", height=320)
                    picture.preprocess = partial(read_upload, picture.preprocess)
                    question = gr.Textbox(label="Question", placeholder="how much is the salad?")
                    s = gr.Slider(
                        self.choices[0],
                        self.choices[-1],
                        value=self.model.config.projector_downsample,
                        step=1,
                        label="s: s × s patches become one image token",
                        info="the larger, the fewer tokens",
                        visible=len(self.choices) > 1,
                    )
                    button = gr.Button("Ask", variant="primary")
                with gr.Column():
                    answer = gr.Textbox(label="Answer", lines=3, interactive=False)
                    gr.Markdown("Where the image tokens behind the answer looked again, by decoder layer:")
                    maps = []
                    with gr.Tabs():
                        for layer in self.model.config.remember_layers:
                            with gr.Tab(f"layer {layer}"):
                                maps.append(gr.Image(show_label=False, interactive=False, height=320))
            table = gr.Dataframe(
                headers=list(COLUMNS),
                column_widths=list(COLUMNS.values()),
                label="Your questions so far, and the milliseconds to the first token of the answer and to its end",
                interactive=False,
                wrap=True,
            )
            if samples := [[str(ROOT / name), text] for name, text in SAMPLES.items() if (ROOT / name).is_file()]:
                gr.Examples(samples, [picture, question])
            for trigger in (button.click, question.submit):
                trigger(self.ask, [picture, question, s, runs], [answer, table, runs, *maps])
        return page


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    name = os.environ.get("LLAVA_VR_MODEL", str(ROOT))
    parser.add_argument("--model", default=name, help="folder or Hub name (default: $LLAVA_VR_MODEL, or this folder)")
    parser.add_argument("--port", type=int, help="of the page (default: the first free one from 7860 on)")
    args = parser.parse_args()
    try:
        demo = Demo(args.model)
    except (OSError, ValueError) as error:
        parser.error(f"--model {args.model}: {str(error).splitlines()[0]}")
    demo.page().launch(server_port=args.port)


if __name__ == "__main__":
    main()
