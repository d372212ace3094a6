"""Draws the node graph of the ComfyUI pack's workflow: integrations/comfyui/workflow.png, the picture of its README.

Usage: python scripts/comfyui_picture.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve

FOLDER = Path(__file__).parents[1] / "integrations" / "comfyui"
TITLES = {
    "CheckpointLoaderSimple": "Load Checkpoint",
    "CLIPTextEncode": "CLIP Text Encode",
    "EmptyLatentImage": "Empty Latent Image",
    "FewstepSampler": "Sampler (fewstep)",
    "FewstepSigmas": "Sigmas (fewstep)",
    "SamplerCustom": "SamplerCustom",
    "VAEDecode": "VAE Decode",
    "SaveImage": "Save Image",
}
WIDGETS = {
    "CheckpointLoaderSimple": ["checkpoint"],
    "CLIPTextEncode": ["text"],
    "EmptyLatentImage": ["width", "height", "batch"],
    "FewstepSampler": ["solver", "eta"],
    "FewstepSigmas": ["grid", "steps", "denoise"],
    "SamplerCustom": ["add noise", "seed", "control", "cfg"],
    "SaveImage": ["prefix"],
}
COLOURS = {
    "MODEL": "#b39ddb",
    "CLIP": "#ffd500",
    "VAE": "#ff6e6e",
    "CONDITIONING": "#ffa931",
    "LATENT": "#ff9cf9",
    "SAMPLER": "#ecb4b4",
    "SIGMAS": "#cdffcd",
    "IMAGE": "#64b5f6",
}
BACKGROUND, BODY, HEAD, OURS, TEXT = "#202024", "#353539", "#2a2a2d", "#2f5d50", "#dddddd"
WIDTH, HEADER, LINE, SPACE = 300, 30, 22, 8


def height_of(node: dict[str, Any]) -> float:
    """Returns the height of a node: its sockets side by side, its widgets below."""
    sockets = max(len(node["inputs"]), len(node["outputs"]))
    return HEADER + SPACE + LINE * (sockets + len(node["widgets_values"])) + SPACE


def socket(node: dict[str, Any], side: str, index: int) -> tuple[float, float]:
    """Returns where a socket is, in the coordinates of the workflow."""
    x = node["x"] + (0 if side == "inputs" else WIDTH)
    return x, node["y"] + HEADER + SPACE + LINE * (index + 0.5)


def arranged(nodes: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Returns the nodes with their places: the columns of the workflow, without overlaps."""
    bottom: dict[float, float] = {}
    for node in sorted(nodes, key=lambda n: n["pos"]):
        node["x"] = node["pos"][0]
        node["y"] = max(node["pos"][1], bottom.get(node["x"], -1e9))
        bottom[node["x"]] = node["y"] + height_of(node) + 26
    return {node["id"]: node for node in nodes}


def draw_node(axes: Any, node: dict[str, Any]) -> None:
    """Draws a node: its title, sockets with names, and widgets with values; nodes of the pack have a green title."""
    x, y, height = node["x"], node["y"], height_of(node)
    ours = node["type"].startswith("Fewstep")
    rounded = "round,pad=0,rounding_size=8"
    axes.add_patch(FancyBboxPatch((x, y), WIDTH, height, boxstyle=rounded, fc=BODY, ec="none"))
    head = OURS if ours else HEAD
    axes.add_patch(FancyBboxPatch((x, y), WIDTH, HEADER, boxstyle=rounded, fc=head, ec="none"))
    title = TITLES[node["type"]]
    axes.text(x + 12, y + HEADER / 2, title, color="white", va="center", size=9, weight="bold")
    for side, align, shift in (("inputs", "left", 12), ("outputs", "right", -12)):
        for index, one in enumerate(node[side]):
            sx, sy = socket(node, side, index)
            axes.plot(sx, sy, "o", color=COLOURS[one["type"]], ms=5.5, zorder=5)
            axes.text(sx + shift, sy, one["name"], color=TEXT, ha=align, va="center", size=7.5)
    top = y + HEADER + SPACE + LINE * max(len(node["inputs"]), len(node["outputs"]))
    for index, value in enumerate(node["widgets_values"]):
        row = top + LINE * index
        name = WIDGETS[node["type"]][index]
        axes.add_patch(
            FancyBboxPatch(
                (x + 12, row + 2),
                WIDTH - 24,
                LINE - 4,
                boxstyle="round,pad=0,rounding_size=9",
                fc="#222226",
                ec="#555559",
                lw=0.6,
            )
        )
        shown = {-1.0: "default"}.get(value, value) if name == "eta" else value
        text = str(shown).lower() if isinstance(shown, bool) else f"{shown}"
        if len(text) < 20:  # else the text says what it is
            axes.text(x + 22, row + LINE / 2, name, color="#999999", va="center", size=7)
        axes.text(
            x + WIDTH - 22, row + LINE / 2, text, color=TEXT, ha="right", va="center", size=7
        )


def draw_link(axes: Any, start: tuple[float, float], end: tuple[float, float], kind: str) -> None:
    """Draws a link from an output to an input in the colour of its type."""
    bend = max(40.0, abs(end[0] - start[0]) / 2)
    points = [start, (start[0] + bend, start[1]), (end[0] - bend, end[1]), end]
    curve = Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])
    axes.add_patch(PathPatch(curve, fc="none", ec=COLOURS[kind], lw=1.8, alpha=0.9, zorder=0.5))


def picture(workflow: dict[str, Any]) -> Figure:
    """Returns the picture of a workflow."""
    nodes = arranged(workflow["nodes"])
    left = min(n["x"] for n in nodes.values()) - 30
    right = max(n["x"] for n in nodes.values()) + WIDTH + 30
    top = min(n["y"] for n in nodes.values()) - 30
    bottom = max(n["y"] + height_of(n) for n in nodes.values()) + 30
    size = ((right - left) / 150, (bottom - top) / 150)
    figure = Figure(figsize=size, dpi=110, facecolor=BACKGROUND)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    for _, source, out, target, into, kind in workflow["links"]:
        ends = socket(nodes[source], "outputs", out), socket(nodes[target], "inputs", into)
        draw_link(axes, *ends, kind)
    for node in nodes.values():
        draw_node(axes, node)
    return figure


if __name__ == "__main__":
    matplotlib.use("Agg")
    content = json.loads((FOLDER / "workflow.json").read_text(encoding="utf-8"))
    picture(content).savefig(FOLDER / "workflow.png", facecolor=BACKGROUND)
    print(f"wrote {FOLDER / 'workflow.png'}")
