"""The graph of a network in the format of TensorFlow, which TensorBoard draws."""

from typing import Any


def encode_graph(nodes: list[dict[str, Any]]) -> bytes:
    """Return a serialized GraphDef of the nodes that ``distlenet.training.network_graph`` describes."""
    from tensorboard.compat.proto.attr_value_pb2 import AttrValue
    from tensorboard.compat.proto.graph_pb2 import GraphDef
    from tensorboard.compat.proto.node_def_pb2 import NodeDef
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.versions_pb2 import VersionDef

    def shape(sizes: list[int]) -> TensorShapeProto:
        return TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in sizes])

    graph = GraphDef(versions=VersionDef(producer=22))  # of TensorFlow 1: TensorBoard asks for a number
    for node in nodes:
        shapes = AttrValue(list=AttrValue.ListValue(shape=[shape(sizes) for sizes in node["shapes"]]))
        attributes = {"_output_shapes": shapes}
        graph.node.append(NodeDef(name=node["name"], op=node["op"], input=node["inputs"], attr=attributes))
    content: bytes = graph.SerializeToString()
    return content
