"""A package that registers what is neither an engine nor a scheme, and a scheme under another name than its own."""

from kani_nb.hardware.schemes import Scheme

NOT_AN_ENGINE = {"model": "none"}
MISNAMED = Scheme(name="named_otherwise", summary="", backend="other", linear_bytes=lambda *sizes: sizes[0] * sizes[1])
