"""A custom node of ComfyUI for `comfyui.py`: random conditioning, small models, and the batch of each model call."""

import folder_paths
from aiohttp import web
from comfy import model_base, model_detection, supported_models
from safetensors.torch import load_file
from server import PromptServer

CALLS = []  # batch of each model call since the last question
detect, apply = model_detection.detect_unet_config, model_base.BaseModel._apply_model


def detect_small(state_dict, key_prefix, *args, **kwargs):
    """Read the width off the weights, also of models of which ComfyUI knows the published one alone."""
    config = detect(state_dict, key_prefix, *args, **kwargs)
    kind = (config or {}).get("image_model")
    if kind in ("flux", "qwen_image"):
        width = len(state_dict[f"{key_prefix}img_in.weight"])
        own = {"hidden_size": width, "num_heads": width // 128}
        config |= own if kind == "flux" else {"num_attention_heads": width // 128}
    return config


def counted(self, x, *args, **kwargs):
    CALLS.append(len(x))
    return apply(self, x, *args, **kwargs)


model_detection.detect_unet_config, model_base.BaseModel._apply_model = detect_small, counted
for key in ("model_channels", "transformer_depth"):
    del supported_models.SDXL.unet_config[key]  # what it is recognised by


@PromptServer.instance.routes.get("/test/calls")
async def calls(request):
    made = list(CALLS)
    CALLS.clear()
    return web.json_response(made)


class Conditioning:
    """Embeddings of a prompt from a file in ComfyUI's folder for input."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"file": ("STRING", {})}}

    def make(self, file):
        parts = load_file(folder_paths.get_annotated_filepath(file))
        return ([[parts["text"], {"pooled_output": parts["pooled"]}]],)


NODE_CLASS_MAPPINGS = {"TestConditioning": Conditioning}
