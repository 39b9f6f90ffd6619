"""Render the sprite atlas of the emoji world from Noto Color Emoji (run once; the result is committed).

    python scripts/make_atlas.py /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf

The font is SIL Open Font License 1.1; its drawings are Apache-2.0 (see train/world/ATLAS_LICENSE).
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WORLD = Path(__file__).resolve().parent.parent / "train" / "world"
CELL, COLUMNS = 64, 11


def sprite(font: ImageFont.FreeTypeFont, code: int) -> Image.Image:
    """One emoji, cropped to its alpha and fitted to CELL pixels on its longer side."""
    image = Image.new("RGBA", (136, 128))
    ImageDraw.Draw(image).text((0, 0), chr(code), font=font, embedded_color=True)
    image = image.crop(image.getbbox())
    scale = CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Resizing in premultiplied alpha keeps transparent pixels from bleeding into the edge.
    return image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("error: give the path of NotoColorEmoji.ttf")
    font = ImageFont.truetype(sys.argv[1], 109)  # the only size of its bitmap strike
    rows = [line.split("\t") for line in (WORLD / "objects.tsv").read_text().splitlines() if not line.startswith("#")]
    atlas = Image.new("RGBA", (COLUMNS * CELL, -(-len(rows) // COLUMNS) * CELL))
    for i, row in enumerate(rows):
        atlas.paste(sprite(font, int(row[2], 16)), (i % COLUMNS * CELL, i // COLUMNS * CELL))
    atlas.save(WORLD / "atlas.png", optimize=True)
    print(f"{len(rows)} sprites, {(WORLD / 'atlas.png').stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
