"""The console command `megatron-detour`: a module for each of its commands."""
