"""The style sheet of our static outputs: small, scoped to `.kani-nb`, and readable on light and on dark pages.

Colours are JupyterLab's own variables. Where they do not exist (Colab, VS Code, a page made by nbconvert) the text
keeps the page's colour, and the few tinted words fall back to middle tones that stand out from white and from
near-black alike. It travels with every output, because a saved notebook has to be readable alone: hence short.
"""

from __future__ import annotations

import re

_SHEET = """
.kani-nb{max-width:60em;font:14px/1.55 var(--jp-content-font-family,system-ui,sans-serif);
 color:var(--jp-content-font-color1,inherit);overflow-wrap:anywhere;
 --kn-line:var(--jp-border-color2,#8886);--kn-soft:var(--jp-content-font-color2,inherit);--kn-tint:#8881}
.kani-nb a{color:var(--jp-content-link-color,#3f83c4)}
.kani-nb article{margin:0 0 8px}
.kani-nb-who{font-size:12px;font-weight:600;color:var(--kn-soft)}
.kani-nb-user>div+div{white-space:pre-wrap;background:var(--kn-tint);border-radius:6px;padding:6px 10px}
.jp-Cell:has(.jp-InputArea-editor):not(:has(.jp-InputPlaceholder)) .kani-nb-above{display:none}
.kani-nb .kani-nb-md>:first-child{margin-top:2px}.kani-nb .kani-nb-md>:last-child{margin-bottom:0}
.kani-nb-md p,.kani-nb-md ul,.kani-nb-md ol{margin:0 0 .6em}
.kani-nb .kani-nb-md :is(h1,h2,h3,h4,h5,h6,[role=heading]){font-weight:600;
 font-size:1.1em;line-height:1.3;margin:.8em 0 .3em}
.kani-nb .kani-nb-md pre{background:none;color:inherit;border:1px solid var(--kn-line);border-radius:6px;
 padding:8px 10px;
 margin:0 0 .6em;overflow:auto;white-space:pre;overflow-wrap:normal;line-height:1.4}
.kani-nb code{font:13px var(--jp-code-font-family,ui-monospace,monospace);color:inherit;
 background:var(--kn-tint);border-radius:3px;padding:1px 3px}
.kani-nb .kani-nb-md pre code{background:none;padding:0;white-space:inherit;overflow-wrap:inherit}
.kani-nb blockquote{border-left:3px solid var(--kn-line);margin:0 0 .6em;padding-left:10px;color:var(--kn-soft)}
.kani-nb table{border-collapse:collapse;margin:0 0 .6em;display:block;overflow:auto}
.kani-nb th,.kani-nb td{border:1px solid var(--kn-line);padding:3px 8px;text-align:left}
.kani-nb .kani-nb-center{text-align:center}.kani-nb .kani-nb-right{text-align:right}
.kani-nb-stat,.kani-nb-note{font-size:12px;color:var(--kn-soft);margin:2px 0;font-variant-numeric:tabular-nums}
.kani-nb-note{border-left:3px solid var(--jp-warn-color1,#b7791f);padding-left:8px;white-space:pre-wrap}
.kani-nb-error{border-left-color:var(--jp-error-color1,#d64545)}
.kani-nb details{font-size:13px;color:var(--kn-soft);margin:0 0 6px}.kani-nb details div{white-space:pre-wrap}
.kani-nb details pre{margin:2px 0 2px 14px;white-space:pre-wrap;background:none;color:inherit}
.kani-nb-said{white-space:pre-wrap;margin:0 0 4px}
.kani-nb progress{width:160px;max-width:40%;vertical-align:middle}
"""

_CODE = """
.kani-nb .k{color:var(--jp-mirror-editor-keyword-color,#2a8a4a)}
.kani-nb .s{color:var(--jp-mirror-editor-string-color,#c4503f)}
.kani-nb .c{color:var(--kn-soft);font-style:italic}
.kani-nb .m{color:var(--jp-mirror-editor-number-color,#3f83c4)}
.kani-nb .f{color:var(--jp-mirror-editor-def-color,#4a7fe0)}
.kani-nb .b{color:var(--jp-mirror-editor-builtin-color,#2a8a4a)}
.kani-nb .d{color:#c4503f}.kani-nb .i{color:#2a8a4a}
"""


def style_tag(*, with_code: bool = False) -> str:
    """The `<style>` element; `with_code` adds the colours of highlighted code."""
    sheet = re.sub(r"\s*\n\s*", "", _SHEET + _CODE if with_code else _SHEET)
    return f"<style>{sheet}</style>"
