"""Samples that are tokenized when a training step needs them.

A training of few steps on many records would otherwise tokenize all of them. The order of the
examples depends on their number, so the samples that are too long are found beforehand: those whose
text is so short that they cannot be are not tokenized.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from molf.data.encoding import EncodedSamples, ids_and_labels, tokenize_samples
from molf.data.rows import Rows
from molf.data.sample_store import ChosenSamples
from molf.data.samples import Sample, hash_of_samples
from molf.errors import InputError
from molf.measure.spread import spread
from molf.measure.tokens import check_tokenizer

PROBED = 1000
"""Number of samples that are tokenized beforehand, for their lengths and faults."""

_ADDED = 8  # tokens that tokenizers add around a text, or a space before it


class OnDemand:
    """Tokenizes one sample at a time.

    Args:
        tokenizer: A fast tokenizer with an EOS token.
        samples: The samples.
        max_length: Longest sample in tokens, BOS and EOS included.
        show: Called with the number of samples that are checked, and that of all.
        check: Called with the largest token of a sample that is read; it raises an error if the
            model lacks it.

    Attributes:
        encoded: The samples that fit, in order.

    Raises:
        InputError: The tokenizer cannot be used, a template rejects a sample, or all samples are
            too long.
    """

    def __init__(
        self,
        tokenizer: Any,
        samples: Sequence[Sample],
        max_length: int,
        show: Callable[[int, int], None] = lambda done, total: None,
        check: Callable[[int], None] = lambda largest: None,
    ) -> None:
        check_tokenizer(tokenizer)
        self._check = check
        self._tokenizer = tokenizer
        self._samples = samples
        self._max_length = max_length
        # Ids and labels of a sample are read one after the other.
        self._latest: tuple[int, list[int], list[int]] | None = None
        probed = set(spread(range(len(samples)), PROBED))
        first = []
        for index, sample in enumerate(samples):
            if index in probed or most_tokens(sample.longest_text(tokenizer)) > max_length:
                first.append(index)
            if index % PROBED == 0:
                show(index, len(samples))
        known, faults = Rows(), Counter[str]()
        too_long, longest = set(), 0
        tokenized = tokenize_samples(tokenizer, ChosenSamples(samples, first))
        for index, (text, rendered) in zip(first, tokenized, strict=True):
            ids, _ = ids_and_labels(text, rendered, tokenizer.eos_token_id)
            longest = max(longest, len(ids))
            if len(ids) > max_length:
                too_long.add(index)
            elif index in probed:
                known.append(ids)
                faults.update(rendered.all_faults(tokenizer))
        self._kept = array("q", (i for i in range(len(samples)) if i not in too_long))
        if not self._kept:
            raise InputError(
                f"All {len(samples)} samples are longer than max_length={max_length} tokens; "
                f"the longest has {longest}."
            )
        self.encoded = EncodedSamples(
            input_ids=_Column(self, 0),
            labels=_Column(self, 1),
            kept=self._kept,
            left_out=len(too_long),
            longest=longest,
            faults=faults,
            known=known or Rows([self.row(0)[0]]),
            records_hash=hash_of_samples(samples[index] for index in self._kept),
        )

    def __len__(self) -> int:
        return len(self._kept)

    def row(self, position: int) -> tuple[list[int], list[int]]:
        """Return the ids and labels of a sample that fits.

        Raises:
            InputError: The model lacks one of its tokens; or it does not fit, because the tokenizer
                makes more tokens than a text has bytes.
        """
        if self._latest is not None and self._latest[0] == position:
            return self._latest[1:]
        sample = self._samples[self._kept[position]]
        [(text, rendered)] = tokenize_samples(self._tokenizer, [sample])
        ids, labels = ids_and_labels(text, rendered, self._tokenizer.eos_token_id)
        if len(ids) > self._max_length:
            raise InputError(
                f"Record {sample.record} has {len(ids)} tokens, more than bytes, and max_length is "
                f"{self._max_length}. Leave it out, or give a larger --max_length."
            )
        self._check(max(ids))
        self._latest = position, ids, labels
        return ids, labels


class _Column(Sequence[list[int]]):
    """The ids, or the labels, of all samples; each is tokenized when it is read."""

    def __init__(self, samples: OnDemand, part: int) -> None:
        self._samples = samples
        self._part = part

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._samples.row(range(len(self))[index])[self._part]


def most_tokens(text: str) -> int:
    """Return an upper bound of a text's tokens, BOS and EOS included.

    A token has at least one byte of the normalized text. Unicode's composed form (NFC) has at most
    three times the bytes of a character outside of ASCII, and the bytes of one inside.
    """
    size = len(text.encode(errors="surrogatepass"))
    # A character of n > 1 bytes adds n - 1 to the difference, at least half of its bytes.
    return size + 4 * (size - len(text)) + _ADDED
