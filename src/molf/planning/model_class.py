"""Choose the transformers class that loads all of a checkpoint and trains on text."""

from __future__ import annotations

from typing import Any

from molf.errors import InputError, reason_of


def auto_class(config: Any) -> Any:
    """Return the auto class of the model class that a configuration names.

    Args:
        config: A transformers configuration.

    Returns:
        `AutoModelForMultimodalLM` or `AutoModelForCausalLM`.

    Raises:
        InputError: transformers has no class that generates text for it.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    # A multimodal configuration belongs to both. The text model leaves out the other towers, so
    # the class with all towers comes first, and is the default if `architectures` is unknown.
    kinds: list[Any] = [AutoModelForMultimodalLM, AutoModelForCausalLM]
    if config.is_encoder_decoder:  # only its decoder alone is a causal language model
        kinds = [AutoModelForCausalLM]
    found = []
    for kind in kinds:
        if type(config) not in kind._model_mapping:
            continue
        known = kind._model_mapping[type(config)]
        classes = known if isinstance(known, tuple) else (known,)
        names = {model_class.__name__ for model_class in classes if model_class.can_generate()}
        if names & set(config.architectures or ()):
            return kind
        found += [kind] if names else []
    if not found:
        raise InputError(
            f"transformers has no causal language model of model_type={config.model_type}. Give a "
            "model that continues text (decoder-only, or multimodal with such a decoder)."
        )
    return found[0]


def make_skeleton(config: Any, **options: Any) -> Any:
    """Create the model of a configuration on the device of the context.

    Args:
        config: A transformers configuration.
        **options: Options of `from_config`, such as `dtype`.

    Raises:
        InputError: The configuration is not that of a model that generates text.
    """
    kind = auto_class(config)
    try:
        return kind.from_config(config, trust_remote_code=False, **options)
    except Exception as error:  # inconsistent values fail with any error where they are first used
        raise InputError(
            f"No {config.model_type} model can be made from the configuration: {reason_of(error)}"
        ) from error
