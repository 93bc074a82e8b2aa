"""Exchange of LoRA factors between shards, in buckets of layers; in one process there is none.

Rows of a weight and of its gradient are cut, and so are the features of A and B. The factor whose
features are the weight's rows is near: its gradient needs this process's rows alone. The other one
is far: products need it whole, and its gradient is a sum over the shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from molf.core.arithmetic.blocks import Blocks
from molf.core.step.layer import RoutedLayer
from molf.core.step.operations import LayerWrites
from molf.core.storage.collectives import Cut

BUCKET_BYTES = 64 << 20
"""Size of the far factors of a bucket, whole."""


def buckets(layers: Sequence[RoutedLayer]) -> Iterator[Sequence[RoutedLayer]]:
    """Yield the layers in their order, in buckets that collectives exchange at once.

    A layer that exchanges nothing is a bucket of its own.
    """
    bucket: list[RoutedLayer] = []
    nbytes, kind = 0, None
    for layer in layers:
        cut = None if layer.processes.is_one else layer.far_factor
        # One collective has one dtype.
        its_kind = cut and (cut.values.dtype, cut.values.device)
        if bucket and (cut is None or nbytes >= BUCKET_BYTES or its_kind != kind):
            yield bucket
            bucket, nbytes = [], 0
        if cut is None:
            yield [layer]
            continue
        bucket.append(layer)
        # Sizes of whole matrices, so that all processes have the same buckets.
        nbytes += cut.size * cut.other * cut.values.element_size()
        kind = its_kind
    if bucket:
        yield bucket


def factor_gradients(bucket: Sequence[RoutedLayer], blocks: Blocks) -> list[tuple[Tensor, Tensor]]:
    """Return `grad A` [R, in] and `grad B` [out, R], or this process's parts, of each layer."""
    processes = bucket[0].processes
    cuts = [] if processes.is_one else [cut for layer in bucket if (cut := layer.far_factor)]
    if not cuts:
        return [layer.factor_gradients(blocks) for layer in bucket]
    wholes = processes.gather(cuts)
    made = [
        list(layer.factor_gradients(blocks, whole))
        for layer, whole in zip(bucket, wholes, strict=True)
    ]
    del wholes
    far = [layer.far_part for layer in bucket]
    terms = [
        cut._replace(values=grads[part]) for cut, grads, part in zip(cuts, made, far, strict=True)
    ]
    for grads, part, own in zip(made, far, processes.sum_and_cut(terms), strict=True):
        grads[part] = own
    return [(grad_A, grad_B) for grad_A, grad_B in made]


def with_whole_operands(
    bucket: Sequence[RoutedLayer], listed: Sequence[LayerWrites]
) -> Sequence[LayerWrites]:
    """Return the writes with products that fit this process's rows of the weights.

    Args:
        bucket: Layers of a bucket.
        listed: Their writes. The factors are written, so that the operands are complete.
    """
    if bucket[0].processes.is_one:
        return listed
    cuts = [_far_operand(*one) for one in zip(bucket, listed, strict=True)]
    present = [cut for cut in cuts if cut is not None]
    # Winners are the same in all processes, so all of them skip it, or none.
    if not present:
        return listed
    wholes = iter(bucket[0].processes.gather(present))
    return [
        writes if cut is None else _with_operand(layer, writes, next(wholes))
        for layer, writes, cut in zip(bucket, listed, cuts, strict=True)
    ]


def _far_operand(layer: RoutedLayer, writes: LayerWrites) -> Cut | None:
    """Return the operand of a layer's product that has the features of the far factor."""
    product = next((write.product for write in writes.tensors if write.product), None)
    if product is None:
        return None
    if layer.far_part == 0:
        return Cut(product.right, 1, layer.shape[1])
    return Cut(product.left, 0, layer.shape[0])


def _with_operand(layer: RoutedLayer, writes: LayerWrites, whole: Tensor) -> LayerWrites:
    """Return a layer's writes with a whole operand."""
    weight, *others = writes.tensors
    assert weight.product is not None, "the weight's write has the product"
    product = weight.product
    product = product._replace(left=whole) if layer.far_part else product._replace(right=whole)
    return writes._replace(tensors=[weight._replace(product=product), *others])
