"""Text on its way into a page: whatever a model wrote is shown as text, and can be nothing else."""

from __future__ import annotations

import html

LONGEST = 6000
"""Characters of one message that are shown."""

_CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


def escape(text: object) -> str:
    """``text`` for an element or a quoted attribute; control characters and lone surrogates made visible."""
    plain = str(text).translate(_CONTROL)
    return html.escape(plain.encode("utf-8", "backslashreplace").decode("utf-8"))


def shortened(text: str) -> str:
    """``text``, its middle left out where it is very long."""
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]}\n… {len(text) - 2 * half:,} characters left out …\n{text[-half:]}"
