"""Draw docs/ratios.svg from docs/benchmarks.json: the time of a step over that of the plain loop by hand.

python docs/plots/ratios.py      # or: nox -s plots
"""

import json
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

DOCS = Path(__file__).parents[1]
ROWS = {
    "steps 1": "1 layer",
    "steps 4": "4 layers",
    "steps 40": "40 layers",
    "steps 500": "500 layers",
    "steps 4 bf16-mixed": "4 layers, bf16",
    "steps GPT 1": "GPT",
    "ddp 2 4 layers 1": "ddp, 4 layers",
    "ddp 2 4 layers 8": "ddp, 4 layers, 8 parts",
    "ddp 2 GPT 1": "ddp, GPT",
    "fsdp 2 8 blocks 1": "fsdp, 8 blocks",
    "fsdp 2 GPT 1": "fsdp, GPT",
    "functional 2 4 layers 8": "functional, 4 layers, 8 parts",
    "flat_sharded 2 8 blocks 1": "flat_sharded, 8 blocks",
    "flat_sharded 2 GPT 1": "flat_sharded, GPT",
}
CONTENDERS = {
    "fused": ("by hand, fused", "#9ecae1", "s"),
    "fabricfn, compiled": ("fabricfn, compiled", "#238b45", "*"),
    "fabricfn, donated": ("fabricfn, donated", "#08519c", "o"),
    "fabricfn, pure": ("fabricfn, pure", "#6baed6", "o"),
    "Lightning Fabric": ("Lightning Fabric", "#d94801", "D"),
    "Accelerate": ("Accelerate", "#fdae6b", "D"),
}


def main() -> None:
    """Draw every row that was measured, the first one at the top."""
    results = json.loads((DOCS / "benchmarks.json").read_text())
    rows = {key: title for key, title in ROWS.items() if key in results}
    mpl.rcParams |= {"svg.hashsalt": "fabricfn", "font.size": 9}
    figure, axes = plt.subplots(figsize=(7, 0.32 * len(rows) + 1.2), layout="constrained")
    axes.axvline(1.0, color="#999", linewidth=1)
    for name, (label, colour, marker) in CONTENDERS.items():
        found = [
            (results[key]["ratios"][name], -place) for place, key in enumerate(rows) if name in results[key]["ratios"]
        ]
        axes.plot(*zip(*found, strict=True), marker, color=colour, label=label, markersize=6, alpha=0.9)
    axes.set_yticks([-place for place in range(len(rows))], list(rows.values()))
    axes.set_xlim(left=0)
    axes.set_xlabel("time of a step over that of the plain loop by hand (less is better)")
    axes.grid(axis="x", color="#ddd")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(DOCS / "ratios.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
