"""Draw README's picture: a photo reduced by 4, enlarged by bicubic interpolation and by EFRDN.

Run from the repository root: python docs/make_before_after.py
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import efrdn_fast

ROOT = Path(__file__).resolve().parent.parent
CROP = (88, 40, 296, 248)  # left, top, right, bottom in the original: eyes and whiskers
ZOOM = 2


def main() -> None:
    hr = Image.open(ROOT / "examples/images/chelsea.png")
    lr = Image.open(ROOT / "examples/images/chelsea_x4.png")
    pixels = torch.from_numpy(np.array(lr)).permute(2, 0, 1)
    bicubic = efrdn_fast.imresize(pixels, 4).permute(1, 2, 0).numpy()
    sr = np.array(efrdn_fast.upscale(lr, scale=4))
    original = np.array(hr)
    panels = [("original", original), ("bicubic x4", bicubic), ("EFRDN x4", sr)]
    side = ZOOM * (CROP[2] - CROP[0])
    page = Image.new("RGB", (3 * side + 20, side + 34), "white")
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(18)
    for i, (name, image) in enumerate(panels):
        left = i * (side + 10)
        crop = Image.fromarray(image).crop(CROP)
        page.paste(crop.resize((side, side), Image.Resampling.NEAREST), (left, 0))
        label = name
        if i:
            label += f", {efrdn_fast.metrics.psnr(image, original, crop_border=4):.2f} dB"
        draw.text((left + 4, side + 6), label, fill="black", font=font)
    out = ROOT / "docs/images/before_after.png"
    page.save(out, optimize=True)
    print(out.relative_to(ROOT))


if __name__ == "__main__":
    main()
