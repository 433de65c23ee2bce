"""Write results/leaderboard/NAME/ and the README's table from the records of a run.

    evenbits run suites/quickstart.toml && python tests/leaderboard.py suites/quickstart.toml
    evenbits run suites/babyllama105.toml && python tests/leaderboard.py suites/babyllama105.toml --page

Everything comes from `evenbits report`; this only puts it where the README shows it: the report with each page and
picture that it refers to, pictures as small PNG. CSV and JSON are left where the report wrote them.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("budget", "method", "linear", "model", "size")  # then every quality column
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^()\s]+)\)")
SHADES = 128  # of a picture's colours; the eye sees no loss, the file has a third of the bytes


def copy_report(written: Path, folder: Path, note: str) -> list[str]:
    """report.md, and from page to page all that they link to, into an emptied `folder`; returns the names, sorted.

    A picture is copied as the PNG beside it. A link to a table of numbers becomes words, for these are not kept.
    Raises FileNotFoundError for a link to nothing.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    waiting, done = ["report.md"], set[str]()
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        if name.endswith(".png"):
            (folder / name).write_bytes(smaller(written / name))
            continue
        text = LINK.sub(_kept, (written / name).read_text())
        waiting += [target for _, _, target in LINK.findall(text)]
        (folder / name).write_text(text.rstrip("\n") + ("\n\n" + note if name == "report.md" else "") + "\n")
    return sorted(done)


def _kept(link: re.Match[str]) -> str:
    picture, words, target = link.groups()
    if target.endswith((".csv", ".json")):
        return f"{words} (`{target}`, beside the records)" if words != target else f"`{target}` (beside the records)"
    return f"{picture}[{words}]({target.removesuffix('.svg')}.png)" if picture else link[0]


def smaller(path: Path) -> bytes:
    """The PNG with a palette."""
    target = io.BytesIO()
    with Image.open(path) as picture:
        flat = picture.convert("RGB").quantize(SHADES, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    flat.save(target, "png", optimize=True)
    return target.getvalue()


def quality_table(report: str) -> str:
    """The report's first table without the settings, which its own page gives."""
    lines = report[report.index("quality at even bits") :].split("\n\n")[1].splitlines()
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))] for line in lines]
    head = rows[0]
    kept = [i for i, name in enumerate(head) if name in COLUMNS or i > head.index("size")]
    return "\n".join("| " + " | ".join(row[i] for i in kept) + " |" for row in rows)


def readme_section(name: str, suite: str, description: str, report: str) -> str:
    """Table and first picture of a copied report."""
    picture = re.search(r"!\[([^\]]*)\]\(([^()\s]+\.png)\)", report)
    shown = f"![{picture[1]}](results/leaderboard/{name}/{picture[2]})\n\n" if picture else ""
    return (
        f"<!-- leaderboard -->\n{description} (`{suite}`, "
        f"[the whole report](results/leaderboard/{name}/report.md)):\n\n{quality_table(report)}\n\n{shown}"
        "`*` best at its budget; `~` not distinguishable from it; `-` another is better at no more bits.\n"
        "<!-- /leaderboard -->"
    )


def main() -> None:
    suite = Path(sys.argv[1])
    facts = tomllib.loads(suite.read_text())
    name = facts["name"]
    evenbits = str(Path(sys.executable).with_name("evenbits"))
    arguments = [evenbits, "report", str(suite), "--results", str(ROOT / "results")]
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    board = ROOT / "results" / "leaderboard"
    note = f"`evenbits run {suite}` at commit {commit.stdout.strip()}."
    copied = copy_report(ROOT / "results" / "runs" / name / "report", board / name, note)
    size = sum((board / name / file).stat().st_size for file in copied)
    sys.stdout.write(f"results/leaderboard/{name}: {len(copied)} files, {size // 1000} kB\n")
    for ending in (".md", ".png"):  # where earlier versions put this suite's report
        (board / f"{name}{ending}").unlink(missing_ok=True)
    if "--page" in sys.argv:  # the README shows another suite
        return
    readme = ROOT / "README.md"
    section = readme_section(name, str(suite), facts["description"], (board / name / "report.md").read_text())
    text, count = re.subn(
        r"<!-- leaderboard -->.*?<!-- /leaderboard -->", lambda _: section, readme.read_text(), flags=re.S
    )
    if count != 1:
        raise SystemExit("README.md needs one <!-- leaderboard --> section")
    readme.write_text(text)


if __name__ == "__main__":
    main()
