"""Faults in steps on shards; the processes of `sharded_world` plant them too."""

# mypy: allow-untyped-defs

from __future__ import annotations

from faults.planting import fault

_TESTS = "test_sharded.py"


@fault("each shard chooses by its own scores", _TESTS, "_totals", "ALONE")
def _(totals, alone):
    return lambda layers, sums, home, processes: totals(layers, sums, home, alone), alone


@fault("gradients of the far factor are those of one shard", _TESTS, "Shards.sum_and_cut")
def _(sum_and_cut):
    def own(self, partial):
        parts = [self.part(one.size) for one in partial]
        return [
            one.values.narrow(one.dim, part.start, part.stop - part.start) * self.count
            for one, part in zip(partial, parts, strict=True)
        ]

    return own


@fault("each process checks its own gradients", _TESTS, "bounds_of", "ALONE")
def _(bounds_of, alone):
    def own(gradients, squares, required=(), processes=alone):
        return bounds_of(gradients, squares, required, alone)

    return own, alone


@fault("every shard starts at row 0", _TESTS, "RowsPlace.first_row")
def _(first_row):
    return lambda self, tensor: 0


@fault("the size of a tensor is that of its shard", _TESTS, "RowsPlace.rows")
def _(rows):
    return lambda self, tensor: len(tensor)
