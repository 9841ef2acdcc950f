"""The code blocks of README and the documentation, and what each needs to run.

A block runs in the tests unless a comment before it says what it needs: `<!-- needs: gpu -->`. Records of experiments
(results, log, architecture) are not run; their commands must exist all the same.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ("CONTRIBUTING.md", "docs/architecture.md", "docs/log.md", "docs/results.md")
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
NEEDS = ("install", "hub", "model", "gpu", "gpus", "vllm", "server", "make")
BLOCK = re.compile(r"(?:<!-- needs: ([a-z]+) -->\n)?^```([a-z]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class CodeBlock:
    """One fenced block: its page, language, text, and what a comment says it needs ("" where none does)."""

    page: str
    language: str
    text: str
    needs: str

    def lines(self) -> list[list[str]]:
        """A shell block's commands as words, continued lines joined, comments left out."""
        return [words for line in self.text.replace("\\\n", " ").splitlines() if (words := command_words(line))]


def command_words(line: str) -> list[str]:
    """Words of a shell command without its comment and where its output goes."""
    words = shlex.split(line, comments=True)
    return words[: words.index(">")] if ">" in words else words


def code_blocks(page: str) -> list[CodeBlock]:
    """All blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [CodeBlock(page, match[2], match[3], match[1] or "") for match in BLOCK.finditer(text)]


def rosaq_lines() -> list[tuple[str, list[str]]]:
    """(page, words behind "rosaq") of every command on every page, under torchrun too."""
    found = []
    for block in (block for page in PAGES for block in code_blocks(page) if block.language in ("bash", "")):
        for line in block.text.replace("\\\n", " ").splitlines():
            if line.startswith("rosaq "):
                found.append((block.page, command_words(line)[1:]))
            elif line.startswith("torchrun ") and " -m rosaq " in line:
                found.append((block.page, command_words(line.partition(" -m rosaq ")[2])))
    return found
