"""The vision tower without the layers after the last one that is read."""

from collections.abc import Sequence

from llava_vr import LlavaVrConfig

from . import mapping
from .sources import Part


def cut_tower(config: LlavaVrConfig, parts: Sequence[Part]):
    """Takes the layers that nothing reads out of the tower's configuration, and their tensors out of the parts.

    Indices of hidden states are from the front then, as those from the end would mean others. The numbers stay as they
    are: with CLIP and SigLIP the last hidden state is the last layer's own output, without the norm after it.
    """
    depth = config.vision_config.num_hidden_layers

    def from_front(layers: Sequence[int]) -> list[int]:
        return [layer % (depth + 1) for layer in layers]

    features, memory = from_front(config.feature_layers), from_front(config.remember_feature_layers)
    levels = from_front(config.projector_kwargs.get("feature_layers", []))
    last = max(1, *features, *memory, *levels)
    if last == depth:
        return
    config.vision_config.num_hidden_layers = last
    config.vision_feature_layer = features if isinstance(config.vision_feature_layer, list) else features[0]
    config.remember_feature_layers = memory
    if levels:
        config.projector_kwargs["feature_layers"] = levels
    unread = [(rf"(?!text_model\.).*\bencoder\.layers\.{i}\..+", mapping.UNREAD) for i in range(last, depth)]
    for part in parts:
        part.rules = [*unread, *part.rules]
