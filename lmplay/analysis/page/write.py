"""The page as one file that contains plotly, script, style and content, and needs no network."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from ...errors import LmplayError
from ...files import write_text

HERE = Path(__file__).parent


def page(content: Mapping[str, Any]) -> str:
    """Return the HTML. Its policy allows only our two scripts, by their digests.

    Raises:
        LmplayError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as e:
        raise LmplayError("the page is drawn by plotly: pip install 'lmplay[page]'") from e
    plotly = get_plotlyjs()
    script = (HERE / "page.js").read_text(encoding="utf-8")
    style = (HERE / "page.css").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src {' '.join(digest(s) for s in (plotly, script))}; "
        "style-src 'unsafe-inline'; "
        "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'"
    )
    template = Template((HERE / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        plotly=plotly, script=script, style=style, policy=policy, content=embedded(content)
    )


def embedded(content: Mapping[str, Any]) -> str:
    """Return JSON that cannot leave its HTML element, whatever a run is called."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def digest(script: str) -> str:
    """Return the hash by which a content security policy knows a script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write the page atomically.

    Raises:
        LmplayError: it cannot be written.
    """
    text = page(content)
    try:
        write_text(path, text)
    except OSError as e:
        raise LmplayError(f"{path}: the page could not be written: {e.strerror}") from e
