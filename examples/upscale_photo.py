"""Upscale one photo by 4 from Python and compare the result with bicubic interpolation.

Run from the repository root: python examples/upscale_photo.py
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

import efrdn_fast

IMAGES = Path(__file__).parent / "images"


def main() -> None:
    lr = Image.open(IMAGES / "chelsea_x4.png")
    hr = np.array(Image.open(IMAGES / "chelsea.png"))
    sr = np.array(efrdn_fast.upscale(lr, scale=4))
    pixels = torch.from_numpy(np.array(lr)).permute(2, 0, 1)
    bicubic = efrdn_fast.imresize(pixels, 4).permute(1, 2, 0).numpy()
    for name, image in (("bicubic", bicubic), ("EFRDN", sr)):
        psnr = efrdn_fast.metrics.psnr(image, hr, crop_border=4)
        ssim = efrdn_fast.metrics.ssim(image, hr, crop_border=4)
        print(f"{name:8} {psnr:.2f} dB  {ssim:.4f}")


if __name__ == "__main__":
    main()
