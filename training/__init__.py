"""Training data as people have it, and a Trainer with a rate for each part: what examples/finetune.py is made of."""

from .batches import EncodedRows, EncodedStream, HubStream, SkippedRows, draw_order, hold_out
from .prepare import prepare
from .sources import Source, is_remote, load_rows, open_sources, to_chat
from .trainer import PARTS, LlavaVrTrainer, part_of


__all__ = [
    "PARTS",
    "EncodedRows",
    "EncodedStream",
    "HubStream",
    "LlavaVrTrainer",
    "SkippedRows",
    "Source",
    "draw_order",
    "hold_out",
    "is_remote",
    "load_rows",
    "open_sources",
    "part_of",
    "prepare",
    "to_chat",
]
