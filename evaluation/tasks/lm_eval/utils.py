"""How an answer to one of the lab's questions is judged."""


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """An exact match, in all and in the question's domain."""
    right = float(results[0] == doc["answer"])
    return {"exact_match": right, doc["domain"]: right}
