"""Execution and scoring of generated SQL, which is untrusted input.

`molf.sql.sandbox` runs it in a locked-down process; `molf.sql.metrics` scores it. This file imports
nothing: worker processes import this package and must start fast.
"""
