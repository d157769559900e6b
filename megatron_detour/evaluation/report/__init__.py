"""The report of an evaluation: statistics, tables, plots and pages."""
