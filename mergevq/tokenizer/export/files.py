"""Graphs as files: ONNX with one file of weights for all of them, or programs of `torch.export`."""

import hashlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from mergevq.runtime.environment import needing
from mergevq.tokenizer.export.graphs import Graph

if TYPE_CHECKING:
    import onnx

Format = Literal["onnx", "pt2"]
OPSET = 18
"""Version of ONNX's operators: the first that reduces and pads as these graphs do."""
WEIGHTS = "weights.bin"
"""Large tensors of all ONNX graphs of a folder, each of them once."""
_LEAST_OUTSIDE = 1024
"""Bytes of the smallest tensor that is stored there."""
_ALIGNMENT = 64
_MOST_IMAGES = 4096
"""Largest batch that a program of `torch.export` promises to take."""
_CHECKED_BATCHES = (1, 3)
_LARGEST_DIFFERENCE = 1e-3
_LEAST_EQUAL = 0.99
"""Share of equal whole numbers: a latent within rounding of 0 may have either sign."""

Run = Callable[[list[Tensor]], Sequence[Tensor]]
"""Inputs of a graph to its results."""


class GraphRecord(TypedDict):
    """One graph in the manifest."""

    file: str
    inputs: dict[str, dict[str, Any]]
    """Type and shape by name; an axis of any length is a name."""
    outputs: list[str]
    equal: float
    """Share of whole numbers among the results that equal those of PyTorch, on examples."""
    largest_difference: float
    """Largest absolute difference of the other results."""


class Difference(NamedTuple):
    """Results of a file beside those of its module."""

    equal: float
    """Share of whole numbers that are equal; 1 where there are none."""
    largest: float
    """Largest absolute difference of real numbers; 0 where there are none."""


def write_graphs(graphs: Sequence[Graph], folder: Path, form: Format) -> list[GraphRecord]:
    """Write graphs into a folder, run each file on examples and compare.

    Args:
        graphs: with names that differ.
        folder: that exists.
        form: of the files.

    Raises:
        RuntimeError: a package is missing, or a file gives other results than its module.
    """
    if form == "onnx":
        runs = _write_onnx(graphs, folder)
    else:
        runs = [_write_program(graph, folder) for graph in graphs]
    records: list[GraphRecord] = []
    for graph, run in zip(graphs, runs, strict=True):
        difference = compare(graph, run)
        file = f"{graph.name}.{form}"
        if difference.equal < _LEAST_EQUAL or not difference.largest <= _LARGEST_DIFFERENCE:
            raise RuntimeError(
                f"{file} gives other results than the model: {difference.equal:.1%} of whole "
                f"numbers are equal and others differ by up to {difference.largest:.2g}; these "
                "versions of the export packages do not fit this model"
            )
        inputs = {
            name: {"dtype": _type_name(each), "shape": _shape(graph, name, each)}
            for name, each in graph.inputs.items()
        }
        records.append(
            GraphRecord(
                file=file,
                inputs=inputs,
                outputs=list(graph.outputs),
                equal=difference.equal,
                largest_difference=difference.largest,
            )
        )
    return records


def compare(graph: Graph, run: Run) -> Difference:
    """Results of a file and of its module on the graph's examples, in several batches."""
    equal, number, largest = 0, 0, 0.0
    for batch in _CHECKED_BATCHES:
        inputs = [_rows(graph, name, each, batch) for name, each in graph.inputs.items()]
        with torch.no_grad():
            wanted = graph.module(*inputs)
        wanted = [wanted] if isinstance(wanted, Tensor) else wanted
        for here, there in zip(wanted, run(inputs), strict=True):
            if here.is_floating_point():
                difference = (here - there).abs().max()
                largest = max(largest, float(difference.nan_to_num(nan=torch.inf)))
            else:
                equal, number = equal + int((here == there).sum()), number + here.numel()
    return Difference(equal / number if number else 1.0, largest)


def _rows(graph: Graph, name: str, example: Tensor, batch: int) -> Tensor:
    """An example with another number of images."""
    for axis, label in graph.free.get(name, {}).items():
        if label == "batch":
            rows = torch.arange(batch) % example.shape[axis]
            return example.index_select(axis, rows)
    return example


def _shape(graph: Graph, name: str, example: Tensor) -> list[int | str]:
    """Lengths of axes, with the names of those that are free."""
    free = graph.free.get(name, {})
    return [free.get(axis, length) for axis, length in enumerate(example.shape)]


def _type_name(tensor: Tensor) -> str:
    """A tensor's type as numpy calls it."""
    return str(tensor.dtype).removeprefix("torch.")


def traced(graph: Graph) -> ExportedProgram:
    """A graph as a program of `torch.export`, of any batch."""
    dims = {name: Dim(name, min=least, max=most) for name, (least, most) in graph.lengths.items()}
    dims["batch"] = Dim("batch", min=1, max=_MOST_IMAGES)
    shapes = tuple(
        {axis: dims[label] for axis, label in graph.free.get(name, {}).items()}
        for name in graph.inputs
    )
    examples = tuple(graph.inputs.values())
    with torch.no_grad(), _quiet():
        program = torch.export.export(graph.module.eval(), examples, dynamic_shapes=shapes)
    for node in program.graph.nodes:
        # Lines of source with the folders of whoever exports.
        node.meta.pop("stack_trace", None)
    return program


def _write_program(graph: Graph, folder: Path) -> Run:
    """Write a program and return a function that runs the file."""
    path = folder / f"{graph.name}.pt2"
    program = traced(graph)
    with _quiet():
        torch.export.save(program, path)
        loaded = torch.export.load(path).module()

    def run(inputs: list[Tensor]) -> Sequence[Tensor]:
        """Results of the file."""
        results = loaded(*inputs)
        return [results] if isinstance(results, Tensor) else results

    return run


def _write_onnx(graphs: Sequence[Graph], folder: Path) -> list[Run]:
    """Write ONNX graphs beside one file of weights, and return functions that run the files."""
    with needing("export", "mergevq export"), _quiet():
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - the exporter needs it

    with Weights(folder / WEIGHTS) as weights:
        for graph in graphs:
            model = onnx_model(graph)
            weights.move(model)
            onnx.save(model, folder / f"{graph.name}.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1

    def runner(graph: Graph) -> Run:
        """A function that runs the file of a graph."""
        session = onnxruntime.InferenceSession(
            folder / f"{graph.name}.onnx", options, providers=["CPUExecutionProvider"]
        )

        def run(inputs: list[Tensor]) -> Sequence[Tensor]:
            """Results of the file."""
            given = {name: each.numpy() for name, each in zip(graph.inputs, inputs, strict=True)}
            return [torch.from_numpy(each) for each in session.run(list(graph.outputs), given)]

        return run

    return [runner(graph) for graph in graphs]


def onnx_model(graph: Graph) -> "onnx.ModelProto":
    """A graph in ONNX, its weights inside."""
    with _quiet():
        exported = torch.onnx.export(
            traced(graph),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            custom_translation_table=_translations(),
        )
        if exported is None:
            raise RuntimeError(f"torch.onnx.export gave nothing for {graph.name}")
        model = exported.model_proto
    _strip(model.graph.node)
    for function in model.functions:
        _strip(function.node)
    return model


def _strip(nodes: Iterable["onnx.NodeProto"]) -> None:
    """Take the exporter's notes away: most of a file, and lines of source with their folders."""
    for node in nodes:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
        for attribute in node.attribute:
            _strip(attribute.g.node)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operators that the exporter leaves out."""
    import onnxscript

    # Its types are those of arrays; what comes here are names of values.
    operators: Any = onnxscript.opset18

    def multiply(tensor: Any, number: Any) -> Any:  # noqa: ANN401 - values of the exporter
        """A product with a number that follows from a shape."""
        return operators.Mul(tensor, operators.CastLike(number, tensor))

    def shift_left(number: Any, places: Any) -> Any:  # noqa: ANN401
        """Bits further up; ONNX shifts unsigned numbers alone."""
        return operators.Mul(number, _power(places))

    def shift_right(number: Any, places: Any) -> Any:  # noqa: ANN401
        """Bits further down, of numbers that are not negative."""
        return operators.Div(number, _power(places))

    def _power(places: Any) -> Any:  # noqa: ANN401
        """Value of a bit."""
        return operators.Pow(operators.CastLike(2, places), places)

    return {
        torch.ops.aten.mul.Scalar: multiply,
        torch.ops.aten.__lshift__.Tensor: shift_left,
        torch.ops.aten.__rshift__.Tensor: shift_right,
    }


class Weights:
    """A file of tensors, each of them once, whichever graphs have it."""

    def __init__(self, path: Path) -> None:
        """Begin an empty file; a `with` block closes it."""
        self._name, self._file = path.name, path.open("wb")
        self._known: dict[bytes, tuple[int, int]] = {}

    def __enter__(self) -> "Weights":
        """The file."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._file.close()

    def move(self, model: "onnx.ModelProto") -> None:
        """Take the large tensors of a graph into the file."""
        import onnx

        for tensor in model.graph.initializer:
            data = onnx.numpy_helper.to_array(tensor).tobytes()
            if len(data) < _LEAST_OUTSIDE:
                continue
            place, length = self._place(data)
            for field in ("raw_data", "float_data", "int64_data", "int32_data"):
                tensor.ClearField(field)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            values = {"location": self._name, "offset": str(place), "length": str(length)}
            for key, value in values.items():
                tensor.external_data.add(key=key, value=value)

    def _place(self, data: bytes) -> tuple[int, int]:
        """Offset and length of a tensor's bytes, written where they are new."""
        digest = hashlib.sha256(data).digest()
        if digest not in self._known:
            self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT))
            self._known[digest] = (self._file.tell(), len(data))
            self._file.write(data)
        return self._known[digest]


@contextmanager
def _quiet() -> Iterator[None]:
    """A block in which the exporter's notes about itself are left out."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch._export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
