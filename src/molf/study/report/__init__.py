"""The report of a study: stored records, their statistics, tables and figures."""
