"""The models by name."""

supported_VLM = {}
