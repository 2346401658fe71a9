"""What a step is: jumps, steps between any two noise levels, cache sites, the ODE. No files, no pipelines."""
