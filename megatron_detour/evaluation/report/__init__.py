"""What an evaluation has found: statistics, tables, plots and pages."""
