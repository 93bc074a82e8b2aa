"""Running and judging SQL that a language model wrote, which is hostile input.

`molf.sql.sandbox` runs it in a locked-down process, `molf.sql.metrics` measures it. Nothing is
imported here: the worker processes import this package and must start fast.
"""
