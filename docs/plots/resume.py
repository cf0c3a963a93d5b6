"""Draw docs/resume.svg: the losses of examples/digits.py, never stopped and killed in mid-epoch, one over the other.

python docs/plots/resume.py      # or: nox -s plots; about a minute on two cores
"""

import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[2]
DIGITS = "examples/digits.py"
KILLER = ("tests/programs/killed.py", "67")
"""Ends the run by SIGKILL after 67 steps: in the third epoch, seven steps after the checkpoint of step 60."""
OPTIONS = ("--devices", "2", "--epochs", "5", "--save-every", "10")

WIDTH, HEIGHT, LEFT, TOP = 640, 200, 52, 34
STYLE = """
text { font: 12px sans-serif; fill: #333 } .small { font-size: 11px } .axis { stroke: #999; fill: none }
.never { stroke: #9ecae1; stroke-width: 6 } .before { stroke: #08519c; stroke-width: 1.5 }
.after { stroke: #d94801; stroke-width: 1.5 } .kill { stroke: #cb181d; stroke-dasharray: 4 3 }
polyline { fill: none; stroke-linejoin: round }
@media (prefers-color-scheme: dark) { text { fill: #ddd } .axis { stroke: #777 } .never { stroke: #2b5c8a }
  .before { stroke: #c6dbef } .after { stroke: #fdae6b } .kill { stroke: #fb6a4a } }
"""

Losses = dict[int, float]
"""Step to loss, as in the CSV file of a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """Two runs of one command: `never` was left alone, the other was killed and called again."""

    title: str
    never: Losses
    before: Losses
    """What the killed run had written."""
    after: Losses
    """What the file held when the second call was done."""
    resumed: int
    """The step of the checkpoint that the second call went on from."""


def difference(story: Story) -> float:
    """The largest difference of losses between the two runs, over all steps that either of them wrote at any time."""
    if story.after.keys() != story.never.keys():
        return math.inf
    pairs = [*story.before.items(), *story.after.items()]
    found = [abs(loss - story.never[step]) for step, loss in pairs]
    return math.inf if any(map(math.isnan, found)) else max(found)


def draw(stories: list[Story], command: str) -> str:
    """The picture as SVG: one panel a story, readable on light and dark backgrounds."""
    height = (HEIGHT + 24) * len(stories) + 44
    panels = "".join(panel(story, (HEIGHT + 24) * number) for number, story in enumerate(stories))
    steps = ", ".join(sorted({str(len(story.never)) for story in stories}))
    worst = max(difference(story) for story in stories)
    caption = (command, f"{steps} steps; largest difference between the runs: {worst:g}")
    lines = "".join(text(LEFT, height - 26 + 16 * row, line, "small") for row, line in enumerate(caption))
    box = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>\n<style>{STYLE}</style>\n{panels}{lines}</svg>\n'


def panel(story: Story, offset: int) -> str:
    """One story; the losses are on a logarithmic scale."""
    right, bottom = WIDTH - 12, offset + HEIGHT
    low, high = min(story.never.values()), max(story.never.values())
    scale = (bottom - offset - TOP) / (math.log(high) - math.log(low) or 1)

    def place(step: int, loss: float) -> tuple[float, float]:
        x = LEFT + (right - LEFT) * step / max(story.never)
        return round(x, 2), round(bottom - scale * (math.log(loss) - math.log(low)), 2)

    def curve(losses: Losses, name: str) -> str:
        points = " ".join("{},{}".format(*place(step, loss)) for step, loss in sorted(losses.items()))
        return f'<polyline class="{name}" points="{points}"/>\n'

    killed, _ = place(max(story.before), high)
    title = f"{story.title}: loss (log scale); wide: never stopped; thin: killed and called again"
    gone_on = {step: loss for step, loss in story.after.items() if step > story.resumed}
    return (
        f'<path class="axis" d="M{LEFT},{offset + TOP} V{bottom} H{right}"/>\n'
        + curve(story.never, "never") + curve(story.before, "before") + curve(gone_on, "after")
        + f'<path class="kill" d="M{killed},{offset + TOP - 8} V{bottom}"/>\n'
        + text(LEFT, offset + 16, title)
        + text(killed + 5, offset + TOP + 2, f"kill -9 after step {max(story.before)}", "small")
        + text(killed + 5, offset + TOP + 17, f"goes on after step {story.resumed}", "small")
        + text(8, offset + TOP + 4, f"{high:.2g}", "small") + text(8, bottom, f"{low:.2g}", "small")
        + text(right - 60, bottom + 15, f"step {max(story.never)}", "small")
    )  # fmt: skip


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Words in the picture."""
    return f'<text x="{x}" y="{y}" class="{kind}">{escape(words)}</text>\n'


def losses_of(path: Path) -> Losses:
    """A CSV file as the example writes it."""
    rows = (row.split(",") for row in path.read_text().splitlines()[1:])
    return {int(step): float(loss) for step, loss in rows}


def run(folder: Path, strategy: str, *prefix: str) -> int:
    """The example, with checkpoints and losses in a folder; its exit status."""
    own = ("--strategy", strategy, "--checkpoint", str(folder), "--losses", str(folder / "losses.csv"))
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *prefix, DIGITS, *OPTIONS, *own]
    return subprocess.run(words, cwd=ROOT, env=environment, check=False).returncode


def tell(strategy: str, folder: Path) -> Story:
    """Run the example three times: to the end, until it is killed, and from there to the end."""
    never, killed = folder / f"{strategy}-never", folder / f"{strategy}-killed"
    statuses = [run(never, strategy), run(killed, strategy, *KILLER)]
    before = losses_of(killed / "losses.csv")
    resumed = max(int(path.name.removeprefix("step-")) for path in killed.glob("step-*"))
    statuses.append(run(killed, strategy))
    assert statuses == [0, -signal.SIGKILL, 0], statuses
    never_losses, after = losses_of(never / "losses.csv"), losses_of(killed / "losses.csv")
    return Story(title=strategy, never=never_losses, before=before, after=after, resumed=resumed)


def main() -> None:
    """Run and draw."""
    folder = Path(tempfile.mkdtemp(prefix="resume-"))
    try:
        stories = [tell(strategy, folder) for strategy in ("ddp", "fsdp")]
    finally:
        shutil.rmtree(folder)
    command = f"python {DIGITS} {' '.join(OPTIONS)} --strategy ddp (fsdp)"
    (ROOT / "docs/resume.svg").write_text(draw(stories, command))
    print(f"wrote docs/resume.svg; largest difference: {max(map(difference, stories)):g}")


if __name__ == "__main__":
    main()
