"""Presentation: number formats, tables, progress, colors, figures and pages."""
