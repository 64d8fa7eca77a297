"""Training data as people have it, and what examples/finetune.py and examples/distill.py are made of."""

from .batches import EncodedRows, EncodedStream, HubStream, SkippedRows, draw_order, hold_out
from .parts import PARTS, add_lora, freeze_unread, part_of, table
from .prepare import prepare
from .sources import Source, folder_of, is_remote, load_rows, open_sources, to_chat
from .trainer import LlavaVrTrainer, end_together, training_arguments


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
    "end_together",
    "folder_of",
    "freeze_unread",
    "hold_out",
    "is_remote",
    "load_rows",
    "open_sources",
    "part_of",
    "prepare",
    "table",
    "to_chat",
    "training_arguments",
]
