"""Serving engines. `register` is the entry point of the vLLM plugin; docs/serving.md says how to use it."""

ARCHITECTURE = "LlavaVrForConditionalGeneration"
TESTED_VLLM = ">=0.32,<0.33"  # the plugin builds on classes that promise nothing to others


def check_vllm_version(version: str):
    """
    Raises:
        ImportError: the plugin was not tested with this version of vLLM.
    """
    from packaging.specifiers import SpecifierSet

    if not SpecifierSet(TESTED_VLLM).contains(version, prereleases=True):
        raise ImportError(f'LLaVA-VR serves with vLLM {TESTED_VLLM}, found {version}: pip install ".[vllm]".')


def register():
    """Makes LLaVA-VR known to vLLM, which calls this in each of its processes, in some more than once."""
    import vllm

    # by name: it is imported where the model is used, and there refuses a version that was not tested
    vllm.ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.vllm_plugin:LlavaVrForVllm")
    try:
        check_vllm_version(vllm.__version__)
    except ImportError:
        return
    from .vllm_setup import register_setup

    register_setup()
