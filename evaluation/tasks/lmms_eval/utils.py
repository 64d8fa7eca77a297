"""The pictures of the lab's questions, and how an answer is judged."""

from PIL import Image


def doc_to_visual(doc: dict) -> list[Image.Image]:
    """The question's picture."""
    return [doc["image"]]


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """An exact match, in all and in the question's domain."""
    right = float(results[0] == doc["answer"])
    return {"exact_match": right, doc["domain"]: right}
