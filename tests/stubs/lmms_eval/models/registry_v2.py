"""What an entry point of the group `lmms_eval.models` gives."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    chat_class_path: str
