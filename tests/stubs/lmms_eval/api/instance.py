"""A request to a model."""

from dataclasses import dataclass


@dataclass
class Instance:
    args: tuple  # context, messages of a document, arguments of generation, document, task, split
