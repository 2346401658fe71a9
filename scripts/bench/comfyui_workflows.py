"""Write the example workflows for ComfyUI, in API form and in the form of its editor.

    python scripts/bench/comfyui_workflows.py PATH_TO_COMFYUI

Run it with ComfyUI's Python: the names and widgets of nodes are those of the running server's /object_info.
"""

import json
from pathlib import Path

from ertacache.cli.arguments import ArgumentParser
from ertacache.cli.comfyui import node_folder
from ertacache.utils.errors import run_program
from parts.comfyui_server import Server, working_folder

OUT = Path(__file__).resolve().parents[2] / "common/ertacache/comfyui/workflows"
COLUMN, ROW, WIDTH = 360, 40, 320  # pixels between nodes, and of one
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
PROMPT = "a lighthouse on a cliff at dusk, oil painting"
FLUX = {
    "model": ("UNETLoader", {"unet_name": "flux1-dev.safetensors", "weight_dtype": "default"}),
    "clip": (
        "DualCLIPLoader",
        {"clip_name1": "t5xxl_fp16.safetensors", "clip_name2": "clip_l.safetensors", "type": "flux"},
    ),
    "vae": ("VAELoader", {"vae_name": "ae.safetensors"}),
    "text": ("CLIPTextEncode", {"clip": "clip", "text": PROMPT}),
    "guidance": ("FluxGuidance", {"conditioning": "text", "guidance": 3.5}),
    "guider": ("BasicGuider", {"model": "model", "conditioning": "guidance"}),
    "noise": ("RandomNoise", {"noise_seed": 0}),
    "sample": (
        "SamplerCustomAdvanced",
        {"noise": "noise", "guider": "guider", "sampler": "sampler", "sigmas": "sigmas", "latent_image": "latent"},
    ),
    "decode": ("VAEDecode", {"samples": "sample", "vae": "vae"}),
    "save": ("SaveImage", {"images": "decode", "filename_prefix": "ertacache"}),
}
PLAN = {
    "plan": ("ERTACacheLoadPlan", {"source": "flux-dev-2x.json", "speedup": 0.0}),
    "sampler": ("ERTACacheSampler", {"plan": "plan"}),
    "sigmas": ("ERTACacheSigmas", {"plan": "plan", "denoise": 1.0, "model": "model"}),
}
EMPTY = {"latent": ("EmptySD3LatentImage", {"width": 1024, "height": 1024, "batch_size": 1})}
WORKFLOWS = {
    "text-to-image": FLUX | PLAN | EMPTY,
    "image-to-image": FLUX
    | PLAN
    | {
        "sigmas": ("ERTACacheSigmas", {"plan": "plan", "denoise": 0.6, "model": "model"}),
        "image": ("LoadImage", {"image": "example.png"}),
        "latent": ("VAEEncode", {"pixels": "image", "vae": "vae"}),
    },
    "learn-a-plan": FLUX
    | EMPTY
    | {
        "sampler": (
            "ERTACacheLearnPlan",
            {
                "name": "flux-dev-2x",
                "speedup": 2.0,
                "images": 8,
                "extra_calls": 60,
                "good_enough": 0.0,
                "effort": "quick",
            },
        ),
        "sigmas": ("BasicScheduler", {"model": "model", "scheduler": "simple", "steps": 30, "denoise": 1.0}),
    },
    "wan-video": FLUX
    | PLAN
    | {
        "model": ("UNETLoader", {"unet_name": "wan2.1_t2v_1.3B_fp16.safetensors", "weight_dtype": "default"}),
        "clip": ("CLIPLoader", {"clip_name": "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "type": "wan"}),
        "vae": ("VAELoader", {"vae_name": "wan_2.1_vae.safetensors"}),
        "guidance": ("CLIPTextEncode", {"clip": "clip", "text": "blurry, static, low quality"}),
        "guider": ("CFGGuider", {"model": "model", "positive": "text", "negative": "guidance", "cfg": 5.0}),
        "plan": ("ERTACacheLoadPlan", {"source": "wan-1.3b-2x.json", "speedup": 0.0}),
        "latent": ("EmptyHunyuanLatentVideo", {"width": 832, "height": 480, "length": 33, "batch_size": 1}),
        "video": ("CreateVideo", {"images": "decode", "fps": 16.0}),
        "save": (
            "SaveVideo",
            {"video": "video", "filename_prefix": "video/ertacache", "format": "auto", "codec": "auto"},
        ),
    },
}


def inputs_of(info: dict) -> dict[str, list]:
    """Return the specifications of a node's inputs, by name and in order."""
    return {**info["input"].get("required", {}), **info["input"].get("optional", {})}


def api_form(nodes: dict) -> dict:
    """Return a workflow as the HTTP interface takes it."""
    ids = {name: str(number) for number, name in enumerate(nodes, 1)}
    form = {}
    for name, (kind, given) in nodes.items():
        links = {key: [ids[value], 0] for key, value in given.items() if value in ids and key not in ("text", "name")}
        form[ids[name]] = {"class_type": kind, "inputs": {**given, **links}, "_meta": {"title": name}}
    return form


def editor_form(api: dict, info: dict) -> dict:
    """Return a workflow as the editor loads it: nodes in columns, each as near to those that take from it as it can."""
    takers: dict[str, list[str]] = {node: [] for node in api}
    for node, given in api.items():
        for value in given["inputs"].values():
            if isinstance(value, list):
                takers[value[0]].append(node)

    def way_to_end(node: str) -> int:
        return 1 + max(map(way_to_end, takers[node]), default=-1)

    last = max(map(way_to_end, api))
    column = {node: last - way_to_end(node) for node in api}
    order = sorted(api, key=lambda node: (column[node], int(node)))
    nodes, links, heights = {}, [], {}
    for place, node in enumerate(order):
        kind, given = api[node]["class_type"], api[node]["inputs"]
        sockets, widgets = [], []
        for name, spec in inputs_of(info[kind]).items():
            type_name = "COMBO" if isinstance(spec[0], list) else spec[0]
            if type_name in WIDGETS:
                value = given.get(name, (spec[1] if len(spec) > 1 else {}).get("default"))
                widgets.append(spec[0][0] if value is None and isinstance(spec[0], list) else value)
                if (spec[1] if len(spec) > 1 else {}).get("control_after_generate"):
                    widgets.append("fixed")
            else:
                sockets.append({"name": name, "type": type_name, "link": None})
        height = (
            60 + 26 * (max(len(sockets), len(info[kind]["output"])) + len(widgets)) + 100 * (kind == "CLIPTextEncode")
        )
        y = heights.get(column[node], 0)
        heights[column[node]] = y + height + ROW
        outputs = [
            {"name": name, "type": type_name, "links": []}
            for name, type_name in zip(info[kind]["output_name"], info[kind]["output"], strict=True)
        ]
        nodes[node] = {
            **{"id": int(node), "type": kind, "pos": [column[node] * COLUMN, y], "size": [WIDTH, height - ROW]},
            **{"flags": {}, "order": place, "mode": 0, "inputs": sockets, "outputs": outputs},
            **{"properties": {"Node name for S&R": kind}, "widgets_values": widgets},
        }
    for node in order:
        for slot, socket in enumerate(nodes[node]["inputs"]):
            value = api[node]["inputs"].get(socket["name"])
            if value is not None:
                number = len(links) + 1
                socket["link"] = number
                nodes[value[0]]["outputs"][value[1]]["links"].append(number)
                links.append([number, int(value[0]), value[1], int(node), slot, socket["type"]])
    return {
        **{"last_node_id": len(api), "last_link_id": len(links), "nodes": [nodes[node] for node in order]},
        **{"links": links, "groups": [], "config": {}, "extra": {}, "version": 0.4},
    }


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, metavar="PATH_TO_COMFYUI")
    checkout = parser.parse_args().checkout
    node_folder(checkout)
    with working_folder() as work, Server(checkout, work) as server:
        server.wait()
        info = server.get("object_info")
    OUT.mkdir(exist_ok=True)
    for name, nodes in WORKFLOWS.items():
        api = api_form(nodes)
        for suffix, form in (("-api", api), ("", editor_form(api, info))):
            text = json.dumps(form, indent=1, ensure_ascii=False) + "\n"
            (OUT / f"{name}{suffix}.json").write_text(text, "utf-8")
        print(f"{name}: {len(api)} nodes")


if __name__ == "__main__":
    run_program(main)
