"""As much of VLMEvalKit's base class as a model needs."""


class BaseModel:
    allowed_types = ["text", "image"]

    def generate(self, message: list[dict], dataset: str | None = None) -> str:
        assert all(part["type"] in self.allowed_types for part in message)
        return self.generate_inner(message, dataset)
