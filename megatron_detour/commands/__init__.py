"""The console command `megatron-detour`, one module per subcommand."""
