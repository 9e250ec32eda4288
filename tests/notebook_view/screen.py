"""A screen that records what is displayed, and the clock it goes by."""

import json
from dataclasses import dataclass, field


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Screen:
    """Records what is displayed, as IPython's `display` would be asked to."""

    clock: Clock
    frames: list[tuple[float, dict, dict]] = field(default_factory=list)
    opened: int = 0

    def __call__(self, bundle, *, raw, metadata, display_id):
        assert raw and display_id
        self.opened += 1
        self.update(bundle, raw=raw, metadata=metadata)
        return self

    def update(self, bundle, *, raw, metadata):
        assert raw
        json.dumps([bundle, metadata]).encode()
        self.frames.append((self.clock.now, bundle, metadata))

    @property
    def bytes(self) -> int:
        return sum(len(text.encode()) for _, bundle, _ in self.frames for text in bundle.values())

    @property
    def last(self) -> dict:
        return self.frames[-1][1]
