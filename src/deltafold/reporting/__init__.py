"""Tables and figures from the records of runs. Reads records only: no model, no archive, no torch.

`tables.tables_of(record)` gives tables, `figures.figures_of(records, folder)` draws PNG files.
"""
