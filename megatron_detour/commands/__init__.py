"""The console command: `megatron-detour plan`, `doctor`, `compare`, `report`."""
