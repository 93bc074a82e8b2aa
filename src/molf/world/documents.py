"""Texts about the world, to train the base model and to measure forgetting.

Each generator yields documents of one form; `training_documents` combines them. To add a form, add
a generator to that list.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from random import Random

from molf.world.draws import choice, integer, sample, shuffled
from molf.world.entities import Entity, World
from molf.world.medicine import MEDICAL_KINDS
from molf.world.words import ASIDES

# A true statement in all its phrasings, without a full stop.
Claim = tuple[str, ...]

_PARAGRAPH_BREAK = "\n\n"

_STATEMENTS_IN_CONTEXT = 3
_PROFILES_PER_SUBJECT = 8
_SENTENCES_PER_PROFILE = 6
_MISCELLANIES = 3000
_HELD_OUT_PROFILES = 100
_HELD_OUT_MISCELLANIES = 60

# Seed offsets, different from each other and from that of the world.
_TRAINING_STREAM = 1_000_003
_HELD_OUT_STREAM = 2_000_003


def training_documents(world: World) -> list[str]:
    """Return the training documents of a base model in random order, one document per sequence.

    Bare statements end without a full stop, as prompt and completion of a request do; running text
    has full stops, and an empty line between paragraphs. Training must add an end-of-text token to
    each document.
    """
    rng = Random(world.seed + _TRAINING_STREAM)
    claims = _claims(world)
    documents = [
        *_texts_about_all(rng, claims),
        *_miscellanies(rng, claims, _MISCELLANIES),
        *_texts_about_all(rng, _claims(world, medical=True)),
    ]
    return shuffled(rng, documents)


def held_out_text(world: World) -> str:
    """Return the text for `forgetting_loss`: learned facts that no request changes.

    The sentences are about entities that are not editable. No paragraph occurs in a training
    document; an empty line separates the paragraphs.
    """
    rng = Random(world.seed + _HELD_OUT_STREAM)
    untouched = {
        subject: claims for subject, claims in _claims(world).items() if not subject.editable
    }
    documents = [
        *_profiles(rng, sample(rng, list(untouched.values()), _HELD_OUT_PROFILES)),
        *_miscellanies(rng, untouched, _HELD_OUT_MISCELLANIES),
    ]
    trained = {
        paragraph
        for document in training_documents(world)
        for paragraph in document.split(_PARAGRAPH_BREAK)
    }
    paragraphs = [
        paragraph
        for document in shuffled(rng, documents)
        for paragraph in document.split(_PARAGRAPH_BREAK)
    ]
    return _PARAGRAPH_BREAK.join(paragraph for paragraph in paragraphs if paragraph not in trained)


def _claims(world: World, *, medical: bool = False) -> dict[Entity, list[Claim]]:
    """Return all claims about each subject of medicine, or about all other subjects."""
    claims: dict[Entity, list[Claim]] = defaultdict(list)
    for fact in world.facts:
        claims[fact.subject].append(fact.statements)
    for attribute in world.attributes:
        for entity in world.of_kind(attribute.kind):
            claims[entity].append(
                tuple(
                    f"{phrasing.format(entity.name)} {entity.attributes[attribute.name]}"
                    for phrasing in attribute.phrasings
                )
            )
    return {
        subject: about
        for subject, about in claims.items()
        if (subject.kind in MEDICAL_KINDS) == medical
    }


def _texts_about_all(rng: Random, claims: dict[Entity, list[Claim]]) -> Iterator[str]:
    """Yield every claim alone and after an unrelated sentence, and texts about each subject."""
    yield from _bare_statements(claims)
    yield from _statements_in_context(rng, claims)
    yield from _profiles(rng, list(claims.values()) * _PROFILES_PER_SUBJECT)


def _bare_statements(claims: dict[Entity, list[Claim]]) -> Iterator[str]:
    """Yield every claim in every phrasing, alone."""
    for claim in _all_claims(claims):
        yield from claim


def _statements_in_context(rng: Random, claims: dict[Entity, list[Claim]]) -> Iterator[str]:
    """Yield each claim after an unrelated sentence, in some of its phrasings."""
    everything = _all_claims(claims)
    for claim in everything:
        for statement in sample(rng, claim, min(len(claim), _STATEMENTS_IN_CONTEXT)):
            yield f"{unrelated_sentence(rng, everything)} {statement}"


def _profiles(rng: Random, subjects: Sequence[list[Claim]]) -> Iterator[str]:
    """Yield a text of several sentences for each subject, given as its claims."""
    for claims in subjects:
        chosen = sample(rng, claims, min(len(claims), _SENTENCES_PER_PROFILE))
        yield " ".join(f"{choice(rng, claim)}." for claim in chosen)


def _miscellanies(rng: Random, claims: dict[Entity, list[Claim]], count: int) -> Iterator[str]:
    """Yield texts of one to three paragraphs of unrelated sentences."""
    everything = _all_claims(claims)
    for _ in range(count):
        paragraphs = []
        for _ in range(integer(rng, 1, 3)):
            sentences = [unrelated_sentence(rng, everything) for _ in range(integer(rng, 2, 4))]
            paragraphs.append(" ".join(sentences))
        yield _PARAGRAPH_BREAK.join(paragraphs)


def unrelated_sentence(rng: Random, claims: Sequence[Claim]) -> str:
    """Draw a claim or, with equal probability, a sentence that is not about the world."""
    if rng.random() < 0.5:
        return choice(rng, ASIDES)
    return f"{choice(rng, choice(rng, claims))}."


def _all_claims(claims: dict[Entity, list[Claim]]) -> list[Claim]:
    return [claim for about in claims.values() for claim in about]
