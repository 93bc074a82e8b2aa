"""Generate answers of a model token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer, set_seed

from molf.cli.texts.options import TextOptions
from molf.data.chat_template import Message, template_of
from molf.errors import InputError
from molf.job.model.loading import load_model, move
from molf.measure.generate import decode, end_tokens, padding_id
from molf.measure.inference import inference, position_limit


class Writer:
    """A loaded model that writes answers.

    Args:
        model: A local directory in transformers format, or a Hub id.
        options: How answers are generated.

    Raises:
        InputError: The model cannot be loaded.
    """

    def __init__(self, model: str | Path, options: TextOptions) -> None:
        loaded = load_model(str(model), getattr(torch, options.dtype))
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        move(self.model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self._options = options
        self._limit = position_limit(self.model.config)
        set_seed(options.seed)

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def ids_of_text(self, text: str) -> list[int]:
        """Return the tokens of a text that is continued as it stands."""
        ids: list[int] = self.tokenizer(text).input_ids
        # Some tokenizers end each text with EOS, after which there is nothing to continue.
        while ids and ids[-1] == self.tokenizer.eos_token_id and text:
            ids = ids[:-1]
        if not ids:
            raise InputError(
                "The prompt is empty, and the model has no token for the start of a text."
            )
        return ids

    def ids_of_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a conversation, up to the start of the next answer.

        Raises:
            InputError: The tokenizer has no chat template, or it rejects the messages.
        """
        template_of(self.tokenizer, has_tools=False)
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # templates raise their own errors
            raise InputError(f"The chat template rejects these messages: {error}") from error
        # The template writes the token at the start of a text itself.
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def answer(self, ids: Sequence[int], show: Callable[[str], None] | None = None) -> str:
        """Return the answer to a context.

        Args:
            ids: Tokens of the context.
            show: Called with each piece of the answer.

        Raises:
            InputError: The context fills the model's positions.
        """
        room = self._options.max_new_tokens
        if self._limit is not None:
            if len(ids) >= self._limit:
                raise InputError(
                    f"The text has {len(ids)} tokens, and the model has {self._limit} positions."
                )
            room = min(room, self._limit - len(ids))
        given = torch.tensor([list(ids)], device=self.model.device)
        own, self.model.generation_config = self.model.generation_config, self._settings(room)
        try:
            with inference(self.model):
                made = self.model.generate(
                    input_ids=given,
                    attention_mask=torch.ones_like(given),
                    streamer=None if show is None else _Pieces(self.tokenizer, show),
                )
        finally:
            self.model.generation_config = own
        return decode(self.tokenizer, made[0, len(ids) :].tolist())

    def _settings(self, tokens: int) -> GenerationConfig:
        options = self._options
        drawn: dict[str, Any] = {"do_sample": False}
        if options.temperature:
            drawn = {
                "do_sample": True,
                "temperature": options.temperature,
                "top_p": options.top_p,
                "top_k": 0,
            }
        return GenerationConfig(
            max_new_tokens=tokens,
            eos_token_id=sorted(end_tokens(self.model, self.tokenizer)),
            pad_token_id=padding_id(self.tokenizer),
            **drawn,
        )


class _Pieces(TextStreamer):
    """Passes whole pieces of an answer to a function."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(
            tokenizer,
            skip_prompt=True,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Show a piece that later tokens do not change."""
        if text:
            self._show(text)
