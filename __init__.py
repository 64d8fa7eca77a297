"""LLaVA-VR as an importable package: the classes that the Hub folder's `auto_map` names."""

from .configuration_llava_vr import LlavaVrConfig
from .modeling_llava_vr import LlavaVrForConditionalGeneration, LlavaVrModel, LlavaVrPreTrainedModel
from .processing_llava_vr import LlavaVrProcessor


__all__ = [
    "LlavaVrConfig",
    "LlavaVrForConditionalGeneration",
    "LlavaVrModel",
    "LlavaVrPreTrainedModel",
    "LlavaVrProcessor",
]
