"""An App of cyclopts that reads the signature of a command once, not for every call."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import wraps
from typing import Any

from cyclopts import App, ArgumentCollection, Parameter

Assemble = Callable[..., ArgumentCollection]


def read_once(assemble: Assemble) -> Assemble:
    """Return `App.assemble_argument_collection` that reads each signature once and copies it then.

    Reading the signature of `molf train` takes longer than parsing a command line.
    """
    # By identity, because an App has no hash. An App that is kept here keeps its identity.
    known: dict[tuple[int, bool], tuple[App, Any, ArgumentCollection]] = {}

    @wraps(assemble)
    def assemble_once(
        self: App, *, default_parameter: Parameter | None = None, parse_docstring: bool = False
    ) -> ArgumentCollection:
        # All that the arguments are made of. Apps above this one give a part of the parameter.
        made_of = (
            self.default_command,
            Parameter.combine(self.app_stack.default_parameter, default_parameter),
            (self.group_arguments, self.group_parameters),
            (self.help_flags, self.version_flags),
        )
        place = (id(self), parse_docstring)
        if place not in known or known[place][1] != made_of:
            made = assemble(
                self, default_parameter=default_parameter, parse_docstring=parse_docstring
            )
            known[place] = (self, made_of, made)
        return _copied(known[place][2])

    return assemble_once


def _copied(arguments: ArgumentCollection) -> ArgumentCollection:
    """Return copies that can be given values without a change to the arguments."""
    copies = {id(argument): copy(argument) for argument in arguments}
    for argument in copies.values():
        argument.tokens = []
        argument.children = ArgumentCollection(copies[id(child)] for child in argument.children)
    return ArgumentCollection(copies.values())


class QuickApp(App):
    """An App for many calls: a study parses the options of each of its cells and methods."""

    assemble_argument_collection = read_once(App.assemble_argument_collection)
