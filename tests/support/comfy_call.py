"""ComfyUI's own nodes by one call, whichever node interface this version wrote them in."""

from typing import Any


def call(node: Any, *arguments: Any) -> tuple:
    """What the node returns.  node: its class."""
    if hasattr(node, "execute"):
        return node.execute(*arguments).args
    return getattr(node(), node.FUNCTION)(*arguments)
