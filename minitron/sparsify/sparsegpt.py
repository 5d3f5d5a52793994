"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): optimal brain surgeon, a block of columns at a time."""

from __future__ import annotations

import torch

from minitron.core.sparsity import Pattern
from minitron.errors import DataError
from minitron.log import get_logger
from minitron.sparsify.shared.config import SparsifyConfig
from minitron.sparsify.shared.method import Inputs, Sparsified
from minitron.sparsify.shared.selecting import pruned_mask

logger = get_logger(__name__)

#: What the damping is multiplied by while the Hessian cannot be factored, and how often.
_MORE, _ATTEMPTS = 10.0, 8


class SparseGPT:
    """Columns from left to right: a weight's score is w² / U_jj², U the upper Cholesky factor of the damped Hessian's inverse.

    Unstructured zeros are chosen once for a block of columns over all rows, those of N:M once for a group of M, from weights that the columns
    before have already updated. What a zero loses is made up for by the columns to its right. Counts are exact; the authors' code compares with
    ≤ and takes one weight more from every block. Inputs that were always 0 lose their weights.
    """

    needs = "hessian"
    can_recover = False

    def __init__(self, config: SparsifyConfig) -> None:
        self._damping, self._block_size = config.damping, config.block_size

    def sparsify(self, name: str, weight: torch.Tensor, inputs: Inputs | None, pattern: Pattern) -> Sparsified:
        """The updated matrix.

        Raises:
            DataError: its Hessian is not finite, or cannot be factored whatever is added to it.
        """
        assert inputs is not None and inputs.hessian is not None
        if "factor" not in inputs.derived:  # queries, keys and values share one
            inputs.derived["factor"] = self._factor(name, inputs.hessian)
        factor = inputs.derived["factor"]
        weight[:, inputs.hessian.diagonal() == 0] = 0.0
        for first in range(0, weight.shape[1], self._block_size):
            block = slice(first, min(first + self._block_size, weight.shape[1]))
            errors = _sparsify_block(weight[:, block], factor[block, block], pattern)
            weight[:, block.stop :] -= errors @ factor[block, block.stop :]
        return Sparsified(weight)

    def _factor(self, name: str, hessian: torch.Tensor) -> torch.Tensor:
        """U [in, in], upper, with Uᵀ U = (H + damping)⁻¹."""
        if not torch.isfinite(hessian).all():
            raise DataError(f"the inputs of '{name}' are NaN or infinite: its Hessian cannot be inverted (try teacher.dtype=float32)")
        damped = hessian.clone()
        diagonal = damped.diagonal()
        diagonal[diagonal == 0] = 1.0
        mean, damping, added = float(diagonal.mean()), self._damping, 0.0
        for _ in range(_ATTEMPTS):
            diagonal += damping * mean - added
            added = damping * mean
            lower, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(torch.isfinite(upper).all()):
                if damping != self._damping:
                    logger.info("  '%s': its Hessian is singular with damping %g, so that %g was taken", name, self._damping, damping)
                return upper
            damping *= _MORE
        raise DataError(f"the Hessian of '{name}' cannot be factored, even with damping {damping / _MORE:g}: give more calibration text")


def _sparsify_block(weight: torch.Tensor, factor: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Zero and update columns [out, count] in place; gives the errors [out, count] that the columns to the right make up for."""
    errors = torch.empty_like(weight)
    weights = weight.clone()  # as they are updated; ``weight`` takes the finished columns
    diagonal = factor.diagonal()
    mask = torch.zeros_like(weight, dtype=torch.bool)
    if pattern.m is None:
        mask = pruned_mask((weights / diagonal).square(), pattern, by_row=False)
    for column in range(weight.shape[1]):
        if pattern.m is not None and column % pattern.m == 0:
            group = slice(column, column + pattern.m)
            mask[:, group] = pruned_mask((weights[:, group] / diagonal[group]).square(), pattern)
        now = weights[:, column]
        kept = now.masked_fill(mask[:, column], 0.0)
        errors[:, column] = (now - kept) / diagonal[column]
        weight[:, column] = kept
        weights[:, column:] -= errors[:, column : column + 1] * factor[column : column + 1, column:]
    return errors
