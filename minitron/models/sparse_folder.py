"""Sparse model folders: what ``sparsity.json`` says, held against the weights beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from minitron.core.sparsity import SparsityRecord, keeps_groups, share_of_zeros
from minitron.errors import CheckpointError
from minitron.models.experts import outputs_first, transposed_matrices
from minitron.models.family import Family
from minitron.models.lazy import FolderWeights
from minitron.models.weights import WeightReader

#: How far a share may lie from the recorded one: less than one weight of any matrix up to 1e6 × 1e6.
_TOLERANCE = 1e-9


def listed_matrices(folder: Path, record: SparsityRecord, family: Family) -> Iterator[tuple[str, torch.Tensor]]:
    """The matrices that a record lists, by their names in memory, one at a time.

    Raises:
        CheckpointError: the model has no such matrix, or its files are damaged.
    """
    with WeightReader(folder) as reader:
        source = FolderWeights(reader, family)
        for name in record.matrices:
            if name not in source.shapes or len(source.shapes[name]) < 2:
                raise CheckpointError(f"{folder / 'sparsity.json'} lists '{name}', and the model there has no such matrix: it is another model's")
            yield name, source.read(name)


def check_sparse(folder: Path, record: SparsityRecord, family: Family) -> None:
    """Refuse a folder whose weights are not what its record says. Reads the listed matrices once.

    Raises:
        CheckpointError: another share of zeros, or a group of N:M with more than N; the sentence names the matrix.
    """
    transposed = transposed_matrices(family)
    for name, weight in listed_matrices(folder, record, family):
        found, told = share_of_zeros(weight), record.matrices[name]
        if abs(found - told) > _TOLERANCE:
            raise CheckpointError(f"'{name}' in {folder} has {found:.4%} zeros and sparsity.json says {told:.4%}: the file belongs to other weights")
        _check_groups(folder, record, name, outputs_first(name, weight, transposed))


def carry_sparsity(record: SparsityRecord, folder: Path, family: Family) -> SparsityRecord:
    """Put a record beside the weights in a folder, its shares counted anew in them.

    Raises:
        CheckpointError: a group of N:M has more than N.
    """
    shares, transposed = {}, transposed_matrices(family)
    for name, weight in listed_matrices(folder, record, family):
        _check_groups(folder, record, name, outputs_first(name, weight, transposed))
        shares[name] = share_of_zeros(weight)
    counted = SparsityRecord(record.method, record.pattern, shares, record.recovered)
    counted.save(folder)
    return counted


def carry_from(source: Path, folder: Path, family: Family) -> None:
    """Carry the record of ``source``, if it has one, over to a folder with the same matrices, perhaps of another dtype.

    Raises:
        CheckpointError: as :func:`carry_sparsity`.
    """
    record = SparsityRecord.load(source)
    if record is not None:
        carry_sparsity(record, folder, family)


def _check_groups(folder: Path, record: SparsityRecord, name: str, weight: torch.Tensor) -> None:
    pattern = record.grouped
    if pattern is not None and not keeps_groups(weight, pattern):
        raise CheckpointError(
            f"'{name}' in {folder} is not {pattern}, although its sparsity.json says so: a group of {pattern.m} has more than {pattern.n}"
        )
