"""Training data as people have it, and what examples/finetune.py and examples/distill.py are made of."""

from .batches import EncodedRows, EncodedStream, HubStream, SkippedRows, draw_order, hold_out
from .parts import PARTS, add_lora, part_of, table
from .prepare import prepare
from .sources import Source, folder_of, is_remote, load_rows, open_sources, to_chat
from .trainer import LlavaVrTrainer


__all__ = [
    "PARTS",
    "EncodedRows",
    "EncodedStream",
    "HubStream",
    "LlavaVrTrainer",
    "SkippedRows",
    "Source",
    "add_lora",
    "draw_order",
    "folder_of",
    "hold_out",
    "is_remote",
    "load_rows",
    "open_sources",
    "part_of",
    "prepare",
    "table",
    "to_chat",
]
