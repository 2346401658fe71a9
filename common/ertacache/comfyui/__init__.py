"""Budget plans in ComfyUI. Only `nodes` imports ComfyUI; the sampler functions run without it."""
