"""Turns a terminal capture into a picture: `tmux capture-pane -e -p | python render.py overview.png`. Needs Pillow.

Knows what the console uses: 16 and 256 colours, bold, dim, reverse, underline.
"""

import re
import sys

from PIL import Image, ImageDraw, ImageFont

FONT, BOLD = "/usr/share/fonts/truetype/dejavu/DejaVuSansMono.ttf", "/usr/share/fonts/truetype/dejavu/DejaVuSansMono-Bold.ttf"
SIZE, WIDTH, HEIGHT, MARGIN = 16, 10, 20, 12
INK, PAPER = (208, 212, 220), (18, 20, 26)
COLOURS = [
    (36, 40, 48), (224, 92, 92), (124, 190, 110), (222, 180, 88), (96, 150, 226), (188, 128, 208), (92, 188, 196), (208, 212, 220),
    (110, 118, 130), (240, 120, 120), (150, 214, 134), (240, 204, 116), (130, 178, 246), (212, 156, 230), (122, 212, 218), (240, 242, 246),
]


def colour(index):
    if index < 16:
        return COLOURS[index]
    if index < 232:
        index -= 16
        return tuple(0 if level == 0 else 55 + 40 * level for level in (index // 36, index // 6 % 6, index % 6))
    return (8 + 10 * (index - 232),) * 3


def apply(style, codes):
    codes = [int(code or 0) for code in codes.split(";")]
    while codes:
        code = codes.pop(0)
        if code == 0:
            style.clear()
        elif code in (1, 2, 4, 7):
            style[{1: "bold", 2: "dim", 4: "underline", 7: "reverse"}[code]] = True
        elif code in (22, 24, 27):
            for name in {22: ("bold", "dim"), 24: ("underline",), 27: ("reverse",)}[code]:
                style.pop(name, None)
        elif code in (38, 48) and codes:
            name, kind = ("fg" if code == 38 else "bg"), codes.pop(0)
            style[name] = colour(codes.pop(0)) if kind == 5 else tuple(codes.pop(0) for _ in range(3))
        elif code in (39, 49):
            style.pop("fg" if code == 39 else "bg", None)
        elif 30 <= code <= 37 or 90 <= code <= 97:
            style["fg"] = colour(code - 30 if code < 90 else code - 82)
        elif 40 <= code <= 47 or 100 <= code <= 107:
            style["bg"] = colour(code - 40 if code < 100 else code - 92)


def cells(line, style):
    for part in re.split(r"(\x1b\[[0-9;]*m)", line):
        if part.startswith("\x1b["):
            apply(style, part[2:-1])
        else:
            for letter in part:
                yield letter, dict(style)


def dots(draw, x, y, bits, ink):
    """Braille, which the font lacks: one bit a dot, numbered down the left column, then down the right."""
    for bit, (column, row) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3)]):
        if bits >> bit & 1:
            left, top = x + 1 + column * 4, y + 2 + row * 4
            draw.rectangle((left, top, left + 2, top + 2), fill=ink)


def main():
    lines = sys.stdin.read().rstrip("\n").split("\n")
    columns = max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in lines)
    image = Image.new("RGB", (columns * WIDTH + 2 * MARGIN, len(lines) * HEIGHT + 2 * MARGIN), PAPER)
    draw, fonts, style = ImageDraw.Draw(image), {False: ImageFont.truetype(FONT, SIZE), True: ImageFont.truetype(BOLD, SIZE)}, {}
    for row, line in enumerate(lines):
        for column, (letter, how) in enumerate(cells(line, style)):
            ink, paper = how.get("fg", INK), how.get("bg", PAPER)
            if how.get("reverse"):
                ink, paper = paper, ink
            if how.get("dim"):
                ink = tuple((a + b) // 2 for a, b in zip(ink, paper))
            x, y = MARGIN + column * WIDTH, MARGIN + row * HEIGHT
            if paper != PAPER:
                draw.rectangle((x, y, x + WIDTH - 1, y + HEIGHT - 1), fill=paper)
            if 0x2800 <= ord(letter) <= 0x28FF:
                dots(draw, x, y, ord(letter) - 0x2800, ink)
            else:
                draw.text((x, y), letter, fill=ink, font=fonts[bool(how.get("bold"))])
            if how.get("underline"):
                draw.line((x, y + HEIGHT - 3, x + WIDTH, y + HEIGHT - 3), fill=ink)
    image.save(sys.argv[1], optimize=True)


if __name__ == "__main__":
    main()
