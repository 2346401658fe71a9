"""The numerics of a run: jumps, scheduler steps, cache sites and the ODE's solution. No files, no pipelines."""
