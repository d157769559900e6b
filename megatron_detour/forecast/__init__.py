"""Forecast of a run before it starts: memory, FLOPs, hours, epochs, disk, and what would stop it."""

from megatron_detour.forecast.forecast import Forecast, forecast
from megatron_detour.forecast.text import headline, plan_table, render
