"""ComfyUI nodes for joint adapters of transpixeler on Wan: RGB and its companions, such as alpha, from one sampling.

To install, copy this folder into ComfyUI's `custom_nodes`. README.md tells of the nodes and their limits.
"""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
