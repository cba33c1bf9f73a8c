"""``python draw.py RUN FILE.png``: draw 100 images of random codes with the network of a run."""

import sys

from PIL import Image
from vae import Vae, draw_images

from distlenet import load_model

ROWS = COLUMNS = 10


def main() -> None:
    run, file = sys.argv[1:]
    images = draw_images(load_model(run, Vae).model, ROWS * COLUMNS)
    height, width = images.shape[1:]
    grid = images.view(ROWS, COLUMNS, height, width).transpose(1, 2).reshape(ROWS * height, COLUMNS * width)
    Image.fromarray((255 * grid).byte().numpy()).save(file)


if __name__ == "__main__":
    main()
