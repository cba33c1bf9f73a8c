"""The sources of images that ``data.name`` selects, one module each, and how they are opened once per node.

Offers ``load_images`` to a task, and ``open_data``, ``load_data`` and ``require_local_data`` to the commands.
"""

from distlenet.data.image_dataset import ImageDataset
from distlenet.data.sources.opening import load_data, load_images, load_on_node, open_data, require_local_data

__all__ = ["ImageDataset", "load_data", "load_images", "load_on_node", "open_data", "require_local_data"]
