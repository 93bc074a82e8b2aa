"""Encode the examples of a training, and those of its evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from molf.data.encoding import PART, EncodedSamples, Show, encode_quietly, warn_of_faults
from molf.data.on_demand import PROBED, OnDemand
from molf.data.rows import largest_of
from molf.data.samples import Sample
from molf.data.tokens.cache import cached, key_of
from molf.data.tokens.processes import encode_in_processes
from molf.errors import InputError
from molf.job.model.loading import LoadedModel
from molf.job.settings.batches import GROUP_BY_LENGTH
from molf.job.settings.resolved import ResolvedSettings
from molf.ranks import ranks


@dataclass(frozen=True)
class Encoder:
    """Encodes samples with the tokenizer of a base.

    Attributes:
        base: The base model.
        settings: The settings of the training.
        max_length: Most tokens of an example.
        show: Called with the number of encoded samples, and that of all.
    """

    base: LoadedModel
    settings: ResolvedSettings
    max_length: int
    show: Show

    def training(self, samples: Sequence[Sample], *, is_stored: bool) -> EncodedSamples:
        """Encode all samples, or those of a long list on demand if the steps need fewer than half.

        Args:
            samples: The samples.
            is_stored: Whether the settings' `token_cache` is used.
        """
        cache = self.settings.token_cache if is_stored else None
        if cache is not None:
            key = key_of(self.base.tokenizer, samples, self.max_length)
            return cached(cache, key, lambda: self._all(samples))
        if self._needs_all(len(samples)):
            return self._all(samples)
        on_demand = OnDemand(
            self.base.tokenizer, samples, self.max_length, self.show, self._check_token
        )
        return on_demand.encoded

    def validation(self, samples: Sequence[Sample]) -> EncodedSamples | None:
        """Encode the samples of the evaluations in the training; None without any."""
        if not samples:
            return None
        try:
            return encode_quietly(self.base.tokenizer, samples, self.max_length)
        except InputError as error:
            raise InputError(f"The records of the evaluations in the training: {error}") from error

    def check(self, encoded: EncodedSamples) -> None:
        """Warn of doubtful samples, and reject a token that the model's embeddings lack."""
        warn_of_faults(encoded)
        self._check_token(largest_of(encoded.tokenized))

    def _needs_all(self, count: int) -> bool:
        settings = self.settings
        # Packing and groups read all lengths.
        if settings.packing or settings.train_sampling_strategy == GROUP_BY_LENGTH:
            return True
        needed = (
            (settings.max_steps or count)
            * settings.per_device_train_batch_size
            * settings.gradient_accumulation_steps
            * ranks().count
        )
        return count <= 2 * PROBED or 2 * needed > count

    def _all(self, samples: Sequence[Sample]) -> EncodedSamples:
        given = self.base.tokenizer, samples, self.max_length
        processes = self.settings.dataset_num_proc or 1
        if processes == 1 or len(samples) <= PART:
            return encode_quietly(*given, self.show)
        return encode_in_processes(*given, processes, self.show)

    def _check_token(self, token: int) -> None:
        """Reject a token that the tokenizer has and the model's embeddings lack."""
        rows = self.base.model.get_input_embeddings().weight.shape[0]
        if token >= rows:
            raise InputError(
                f"model {self.settings.model}: the examples have the token "
                f"{self.base.tokenizer.convert_ids_to_tokens(token)!r} (id {token}), and the model "
                f"has {rows} embeddings. Resize them, or give data without it."
            )
