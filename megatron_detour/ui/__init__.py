"""What people are shown: numbers, tables, colors, pages."""
