"""What the programs under ``example/`` share: arguments, model paths, prompts, jobs, the report and exit codes.

``arguments``, ``model_paths``, ``prompts`` and ``main`` import neither PyTorch nor diffusers, so that bad input is refused
at once.
"""
