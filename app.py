"""The demo of LLaVA-VR: ask about a picture, choose the number of image tokens, see where the model looks again.

It opens in a browser, and runs as a Gradio Space of the Hub as it is: see docs/demo.md.
"""

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import gradio as gr
import torch
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
COLUMNS = ["s", "image tokens", "first token (ms)", "all (ms)", "question", "answer"]
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


class Demo:
    """A model, and what the page calls."""

    def __init__(self, name: str):
        self.processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
        self.model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True).eval()
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.choices = sorted(self.model.config.downsamples)

    def encode(self, picture: str | None, question: str, s: int) -> dict[str, torch.Tensor]:
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
        """The answer as it comes; at its end also the runs so far, for the table, and the maps of the modules."""
        s, start = min(self.choices, key=lambda choice: abs(choice - s)), time.perf_counter()
        inputs = self.encode(picture, question, s)
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
            yield answer, runs, runs, gr.skip()
        thread.join()
        if "error" in done:
            raise gr.Error(str(done["error"]))
        end = time.perf_counter()
        tokens = int((inputs["input_ids"] == self.model.config.image_token_id).sum())
        times = [round(1000 * (moment - start)) for moment in (streamer.first_token or end, end)]
        runs = [[s, tokens, *times, question, answer], *runs]
        config = self.model.config
        has_maps = config.remember_layers and config.window_size(s)
        yield answer, runs, runs, self.draw(picture, done["sequences"], inputs) if has_maps else []

    def draw(self, picture: str, sequences: torch.Tensor, inputs: dict[str, torch.Tensor]) -> list[tuple]:
        """The answer's maps over the picture, one for each module, with captions."""
        (maps,) = answer_maps(sequences, inputs, self.model, self.processor)
        return [(draw_map(picture, found), f"after decoder layer {layer}") for layer, found in maps.items()]

    def page(self) -> gr.Blocks:
        lowest, highest, default = self.choices[0], self.choices[-1], self.model.config.projector_downsample
        with gr.Blocks(title="LLaVA-VR") as page:
            gr.Markdown(INTRODUCTION)
            runs = gr.State([])
            with gr.Row():
                with gr.Column():
                    picture = gr.Image(type="filepath", label="Picture", height=320)
                    question = gr.Textbox(label="Question", placeholder="how much is the salad?")
                    s = gr.Slider(
                        lowest,
                        highest,
                        value=default,
                        step=1,
                        label="s: patches a side that become one image token",
                        info="more patches, fewer tokens: faster, and less exact",
                    )
                    button = gr.Button("Ask", variant="primary")
                    gr.Examples([[str(ROOT / name), text] for name, text in SAMPLES.items()], [picture, question])
                with gr.Column():
                    answer = gr.Textbox(label="Answer", lines=3, interactive=False)
                    maps = gr.Gallery(
                        label="Where the image tokens that the answer attended to had looked (click to enlarge)",
                        columns=3,
                        object_fit="contain",
                    )
            table = gr.Dataframe(headers=COLUMNS, label="Your questions so far", interactive=False, wrap=True)
            for trigger in (button.click, question.submit):
                trigger(self.ask, [picture, question, s, runs], [answer, table, runs, maps])
        return page


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    name = os.environ.get("LLAVA_VR_MODEL", str(ROOT))
    parser.add_argument("--model", default=name, help="folder or Hub name (default: $LLAVA_VR_MODEL, or this folder)")
    parser.add_argument("--port", type=int, help="of the page (default: the first free one from 7860 on)")
    args = parser.parse_args()
    Demo(args.model).page().launch(server_port=args.port)


if __name__ == "__main__":
    main()
