"""The cases of each family, a file each: its `cases`, `small_cases`, `option_cases`, `sweeps`."""
