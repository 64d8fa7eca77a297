"""LLaVA-VR as an importable package: the classes that the Hub folder's `auto_map` names."""

from .collator_llava_vr import LlavaVrCollator
from .configuration_llava_vr import LlavaVrConfig
from .maps_llava_vr import answer_maps, draw_map, remember_maps
from .modeling_llava_vr import LlavaVrForConditionalGeneration, LlavaVrModel, LlavaVrPreTrainedModel
from .processing_llava_vr import LlavaVrProcessor


__version__ = "0.2.0"
__all__ = [
    "LlavaVrCollator",
    "LlavaVrConfig",
    "LlavaVrForConditionalGeneration",
    "LlavaVrModel",
    "LlavaVrPreTrainedModel",
    "LlavaVrProcessor",
    "answer_maps",
    "draw_map",
    "remember_maps",
]

# `save_pretrained` then copies the code into the folder, as it does for a model loaded with `trust_remote_code=True`
LlavaVrConfig.register_for_auto_class()
LlavaVrModel.register_for_auto_class("AutoModel")
LlavaVrForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
LlavaVrProcessor.register_for_auto_class("AutoProcessor")
