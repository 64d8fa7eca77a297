"""Asks a LLaVA-VR server about pictures and prints its answer."""

import argparse
import base64
import mimetypes
from pathlib import Path


EXAMPLES = """examples, after examples/serve.sh in another terminal:
  python examples/ask_server.py examples/receipt.png "how much is the salad?"
  python examples/ask_server.py examples/receipt.png "how much is the salad?" --downsample 2
  python examples/ask_server.py first.jpg second.jpg "What costs 12?" --url http://localhost:8001/v1
"""


def image_url(source: str) -> str:
    """A URL as it is; a file as a data URI."""
    if source.startswith(("http://", "https://")):
        return source
    kind = mimetypes.guess_type(source)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(Path(source).read_bytes()).decode()}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="*", help="the pictures: paths or URLs")
    parser.add_argument("question", help="what to ask about them")
    parser.add_argument("--url", default="http://localhost:8000/v1", help="of the server (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="longest answer, in tokens (default: 100)")
    parser.add_argument("--downsample", type=int, help="s: s x s patches become one token; one of the model's choices")
    args = parser.parse_args()
    import openai  # of vLLM's environment

    try:
        parts = [{"type": "image_url", "image_url": {"url": image_url(image)}} for image in args.images]
        client = openai.OpenAI(base_url=args.url, api_key="none")
        response = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[{"role": "user", "content": [*parts, {"type": "text", "text": args.question}]}],
            max_tokens=args.max_new_tokens,
            temperature=0,
            extra_body={"mm_processor_kwargs": {"projector_downsample": args.downsample}} if args.downsample else None,
        )
    except openai.APIConnectionError:
        parser.error(f"no server answers at {args.url}: start examples/serve.sh")
    except openai.APIStatusError as error:
        parser.error(error.message)
    except OSError as error:
        parser.error(str(error))
    print(response.choices[0].message.content)


if __name__ == "__main__":
    main()
