"""What vLLM asks before it loads the model: its settings for LLaVA-VR, and refusals of those that cannot work."""

from vllm.config import CUDAGraphMode, ModelConfig, VllmConfig
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.tokenizers.registry import TokenizerRegistry

from . import ARCHITECTURE


TOKENIZER_MODE = "llava_vr"


class LlavaVrSetup(VerifyAndUpdateConfig):
    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig):
        if model_config.tokenizer_mode in ("auto", "hf"):
            model_config.tokenizer_mode = TOKENIZER_MODE  # selects the renderer, which checks placeholders

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig):
        config = vllm_config.model_config.hf_config
        if not config.remember_layers:
            return
        for option, reason in unsupported_options(vllm_config).items():
            raise ValueError(f"LLaVA-VR cannot be served with {option}: {reason}")
        if vllm_config.compilation_config.cudagraph_mode is None:
            vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE


def unsupported_options(vllm_config: VllmConfig) -> dict[str, str]:
    """The options that were asked for and would leave out the Vision Remember modules, each with the reason."""
    model, parallel, lora = vllm_config.model_config, vllm_config.parallel_config, vllm_config.lora_config
    layers, last = model.hf_config.text_config.num_hidden_layers, max(model.hf_config.remember_layers)
    stages, graphs = parallel.pipeline_parallel_size, vllm_config.compilation_config.cudagraph_mode
    found = {}
    if stages > 1 and get_pp_indices(layers, 0, stages)[1] <= last:
        found[f"--pipeline-parallel-size {stages}"] = (
            f"the first stage holds the memory, so it must hold all modules and have the layers up to {last}; set "
            "VLLM_PP_LAYER_PARTITION, or use --tensor-parallel-size."
        )
    if graphs is not None and graphs.has_full_cudagraphs():
        found[f"cudagraph_mode {graphs.name}"] = (
            "a full graph takes one token of an image for a decoding step and leaves the modules out; use PIECEWISE, "
            "the default."
        )
    if parallel.prefill_context_parallel_size > 1:
        found["--prefill-context-parallel-size"] = "the memory is kept by the tokens' positions in the whole step."
    if parallel.use_ubatching:
        found["--enable-dbo"] = "the memory is kept by the tokens' positions in the whole step."
    if model.multimodal_config.enable_mm_embeds:
        found["--enable-mm-embeds"] = "an image's embeddings come without its memory; send the image."
    if model.enable_prompt_embeds:
        found["--enable-prompt-embeds"] = "a prompt's embeddings come without the memory of its images."
    if lora is not None and lora.enable_tower_connector_lora:
        found["--enable-tower-connector-lora"] = (
            "adapters go on the decoder alone; merge others with convert_weights.py."
        )
    return found


def register_setup():
    """Idempotent."""
    if ARCHITECTURE not in MODELS_CONFIG_MAP:
        MODELS_CONFIG_MAP[ARCHITECTURE] = LlavaVrSetup
        TokenizerRegistry.register(TOKENIZER_MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
        RENDERER_REGISTRY.register(TOKENIZER_MODE, f"{__package__}.vllm_inputs", "LlavaVrRenderer")
