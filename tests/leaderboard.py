"""Write results/leaderboard/ and the README's table from the records of a run.

    evenbits run suites/quickstart.toml && python tests/leaderboard.py suites/quickstart.toml
    evenbits run suites/babyllama105.toml && python tests/leaderboard.py suites/babyllama105.toml --page

Everything comes from `evenbits report`; this only puts it where the README shows it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "results" / "leaderboard"
COLUMNS = ("budget", "method", "linear", "model", "size")  # then every quality column


def quality_table(report: str) -> str:
    """The report's first table without the settings, which its own page gives."""
    lines = report[report.index("quality at even bits") :].split("\n\n")[1].splitlines()
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))] for line in lines]
    head = rows[0]
    kept = [i for i, name in enumerate(head) if name in COLUMNS or i > head.index("size")]
    return "\n".join("| " + " | ".join(row[i] for i in kept) + " |" for row in rows)


def main() -> None:
    suite = Path(sys.argv[1])
    facts = tomllib.loads(suite.read_text())
    name = facts["name"]
    evenbits = Path(sys.executable).with_name("evenbits")
    arguments = [evenbits, "report", suite, "--results", ROOT / "results"]
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
    written = ROOT / "results" / "runs" / name / "report"
    report = (written / "report.md").read_text()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    note = f"\n`evenbits run {suite}` at commit {commit.stdout.strip()}.\n"
    (FOLDER / f"{name}.md").write_text(report.rstrip("\n") + "\n" + note)
    plot = sorted(written.glob("pareto-*.png"))[0]
    shutil.copyfile(plot, FOLDER / f"{name}.png")
    if "--page" in sys.argv:  # the README shows another suite
        return
    readme = ROOT / "README.md"
    section = (
        f"<!-- leaderboard -->\n{facts['description']} (`{suite}`, "
        f"[the whole report](results/leaderboard/{name}.md)):\n\n"
        f"{quality_table(report)}\n\n![{plot.stem}](results/leaderboard/{name}.png)\n\n"
        "`*` best at its budget; `~` not distinguishable from it; `-` another is better at no more bits.\n"
        "<!-- /leaderboard -->"
    )
    text, count = re.subn(
        r"<!-- leaderboard -->.*?<!-- /leaderboard -->", lambda _: section, readme.read_text(), flags=re.S
    )
    if count != 1:
        raise SystemExit("README.md needs one <!-- leaderboard --> section")
    readme.write_text(text)


if __name__ == "__main__":
    main()
