"""The example workflows: both forms say the same, and our nodes have the inputs that they are given."""

import json

import pytest
from test_nodes import nodes  # noqa: F401  (fixture)

from conftest import ROOT

FOLDER = ROOT / "common/ertacache/comfyui/workflows"
NAMES = ("text-to-image", "image-to-image", "learn-a-plan", "wan-video")


def read(name):
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


def test_no_other_files_are_there():
    assert {path.stem for path in FOLDER.iterdir()} == {name + end for name in NAMES for end in ("", "-api")}


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_have_the_same_links(name):
    api, editor = read(f"{name}-api"), read(name)
    assert {str(node["id"]): node["type"] for node in editor["nodes"]} == {
        id: node["class_type"] for id, node in api.items()
    }
    sockets = {node["id"]: [socket["name"] for socket in node["inputs"]] for node in editor["nodes"]}
    drawn = {(str(end), sockets[end][slot], str(start), out) for _, start, out, end, slot, _ in editor["links"]}
    given = {
        (id, key, *value) for id, node in api.items() for key, value in node["inputs"].items() if type(value) is list
    }
    assert drawn == given
    for node in editor["nodes"]:
        values = [value for value in api[str(node["id"])]["inputs"].values() if type(value) is not list]
        assert all(value in node["widgets_values"] for value in values)


@pytest.mark.parametrize("name", NAMES)
def test_our_nodes_have_these_inputs(name, nodes):  # noqa: F811
    kinds = (nodes.LoadPlan, nodes.PlanSampler, nodes.PlanSigmas, nodes.LearnPlan)
    schemas = {schema.node_id: schema for schema in (kind.define_schema() for kind in kinds)}
    used = [node for node in read(f"{name}-api").values() if node["class_type"].startswith("ERTACache")]
    for node in used:
        inputs = {given.id for given in schemas[node["class_type"]].inputs}
        assert set(node["inputs"]) == inputs
    assert len(used) == (1 if name == "learn-a-plan" else 3)
