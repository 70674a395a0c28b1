"""Cut the two text samples that ship with the package from larger files of novels.

Excerpts of equal length are spread evenly over the source, so that they come from many different books, and are moved
to the nearest paragraph border. Nothing is random: the same source gives the same bytes.

    python scripts/cut_demo_text.py --source train.txt --excerpts 32 --kilobytes 512 --out compress/data/calibration.txt
    python scripts/cut_demo_text.py --source valid.txt --excerpts 24 --kilobytes 180 --out compress/data/heldout.txt
"""

from __future__ import annotations

import argparse
from pathlib import Path

PARAGRAPH = "\n\n"


def excerpt(text: str, start: int, length: int) -> str:
    """About `length` characters of whole paragraphs, from the first paragraph that begins at or after `start`."""
    begin = text.find(PARAGRAPH, start)
    begin = start if begin < 0 else begin + len(PARAGRAPH)
    end = text.rfind(PARAGRAPH, begin, begin + length)
    return text[begin : end if end > begin else begin + length].strip("\n")


def cut(text: str, excerpts: int, length: int) -> str:
    """`excerpts` pieces, evenly spread over `text`, that have about `length` characters in all."""
    stride = len(text) // excerpts
    return PARAGRAPH.join(excerpt(text, i * stride, length // excerpts) for i in range(excerpts)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="a text file, UTF-8")
    parser.add_argument("--excerpts", type=int, default=32, help="number of places to cut from [default: 32]")
    parser.add_argument("--kilobytes", type=int, default=512, help="length of the result, about [default: 512]")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    sample = cut(options.source.read_text(encoding="utf-8"), options.excerpts, options.kilobytes * 1024)
    options.out.write_text(sample, encoding="utf-8", newline="\n")
    print(f"{options.out}: {options.out.stat().st_size} bytes from {options.excerpts} places")


if __name__ == "__main__":
    main()
