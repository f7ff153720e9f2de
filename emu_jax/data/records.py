"""ArrayRecord files of `tf.train.Example`s: the format of prepared data and of precomputed latents.

Reading and writing them needs TFDS's protocol buffers, but not TensorFlow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from emu_jax.storage import Path, write_atomically


def pack_record(strings: Mapping[str, Iterable[bytes]], floats: Mapping[str, Iterable[float]] | None = None) -> bytes:
    """Lists of byte strings and of float32 numbers, by name -> one record, the same bytes on every machine and run."""
    example = tf_example_pb2.Example()
    fields = example.features.feature
    for name, values in strings.items():
        fields[name].bytes_list.value.extend(values)
    for name, numbers in (floats or {}).items():
        fields[name].float_list.value.extend(numbers)
    return example.SerializeToString(deterministic=True)


def unpack_record(record: bytes) -> dict[str, Sequence[Any]]:
    """The inverse of `pack_record`: every list by name.

    Raises:
      ValueError: the bytes are not a record.
    """
    try:
        fields = tf_example_pb2.Example.FromString(record).features.feature
    except DecodeError as error:
        raise ValueError(str(error)) from error
    return {name: field.bytes_list.value or field.float_list.value for name, field in fields.items()}


def write_records(path: Path, records: Iterable[bytes]) -> int:
    """Writes an ArrayRecord file, which appears only when it is complete; returns the number of records."""
    count = 0
    with write_atomically(path) as partial:
        # group_size:1 makes every record its own compression block: random access then reads no neighbours.
        writer = ArrayRecordWriter(str(partial), "group_size:1")
        for record in records:
            writer.write(record)
            count += 1
        writer.close()
    return count
